"""A run of the model in Markdown, which reads as well in a terminal: tables, and in words what lost or failed."""

from bench.model.figures import JobFigures, ModelRun, PeerFigures
from bench.report.parts import table, title

STEADY = 0.1  # on a quiet machine the quartiles lie 0.01 to 0.03 of the median apart


def markdown(run: ModelRun) -> str:
    """The whole report: what ran where, the table, and in words what went wrong or is slower."""
    parts = [f"### {title(run)}", _method(run), _peers(run), overview(run), _jobs(run), *_notes(run)]
    return "\n\n".join(parts) + "\n"


def _method(run):
    rounds = sorted({max(len(peer.rounds) for peer in job.peers) for job in run.jobs})
    return (
        f"Medians and quartiles of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds of up to"
        f" {max(job.rows for job in run.jobs)} rows, peers in turn; ratios are taken round by round. Padding"
        f" counts for nothing. Memory is the peak of the whole process, while it runs a job or until it is ready;"
        f" conversions of the checkpoint, which happen once, are left out. {run.date[:10]}."
    )


def _peers(run):
    rows = [
        [
            peer.name,
            ", ".join(f"{name} {version}" for name, version in peer.versions.items()),
            f"{peer.first_seconds:.1f} s" if peer.first_seconds else "",
        ]
        for peer in run.peers
    ]
    return table(["who", "runs on", "first batch"], rows)


def overview(run: ModelRun) -> str:
    """A row for every peer and a column for every job: our rate, and for the others how much faster we are.

    Beside them stand the memory that it takes in the first job, and to load, and the time until it is ready.
    """
    jobs, loaded = run.jobs, {peer.name: peer for peer in run.peers}
    names = list(dict.fromkeys(peer.peer for job in jobs for peer in job.peers))
    by_name = [{peer.peer: peer for peer in job.peers} for job in jobs]
    rows = [
        [name, *(_overview_cell(peers.get(name)) for peers in by_name), *_needs(by_name[0].get(name), loaded.get(name))]
        for name in names
    ]
    columns = [f"{job.name}, {job.fill:.0%} full" for job in jobs]
    return table(["", *columns, f"memory, {jobs[0].name}", "memory to load", "start to ready"], rows)


def _needs(peer, loaded):
    load = [_mebibytes(loaded.load_memory), f"{loaded.load_seconds:.1f} s"] if loaded else ["-", "-"]
    return [_mebibytes(peer and peer.peak_memory), *load]


def _mebibytes(size):
    return f"{size / 2**20:,.0f} MiB" if size else "-"


def _overview_cell(peer):
    if peer is None or not peer.rounds:
        return "-"
    if peer.speedup is None:
        return f"{peer.tokens_per_second.median:,.0f} tokens/s"
    return f"{peer.speedup.median:.2f}x"


def _jobs(run):
    rows = []
    for job in run.jobs:
        label = f"{job.name}, {job.fill:.0%} full"
        for peer in job.peers:
            rows.append([label, *_cells(peer)])
            label = ""
    header = [
        "job",
        "who",
        "real tokens/s (quartiles)",
        "rows/s",
        "batch, ms (99th percentile)",
        "our speed / theirs",
        "peak memory",
        "our memory / theirs",
    ]
    return table(header, rows)


def _cells(peer: PeerFigures) -> list[str]:
    rate, speedup, memory = peer.tokens_per_second, peer.speedup, peer.memory_ratio
    batch = peer.batch_seconds
    return [
        peer.peer,
        f"{rate.median:,.0f} ({rate.q1:,.0f}-{rate.q3:,.0f})" if rate else "not measured",
        f"{peer.rows_per_second:,.1f}" if rate else "",
        f"{batch.median * 1e3:,.0f} ({batch.p99 * 1e3:,.0f})" if rate else "",
        f"{speedup.median:.2f}x ({speedup.q1:.2f}-{speedup.q3:.2f})" if speedup else "",
        f"{peer.peak_memory / 2**20:,.0f} MiB" if peer.peak_memory else "",
        f"{memory:.2f}x" if memory else "",
    ]


def losses(jobs: list[JobFigures]) -> list[str]:
    """In words, where erniem_fast is slower; a list of one paragraph or none."""
    slower = []
    for job in jobs:
        ratios = [(peer.peer, peer.speedup.median) for peer in job.rivals]
        lost = [f"{name} ({ratio:.2f}x)" for name, ratio in ratios if round(ratio, 2) < 1]
        slower += [f"{job.name} against {', '.join(lost)}"] if lost else []
    return [f"**erniem_fast is slower** in {'; '.join(slower)}."] if slower else []


def _unsteady(run):
    shaky = []
    for job in run.jobs:
        names = [peer.peer for peer in job.peers if _spread(peer.tokens_per_second) > STEADY]
        shaky += [f"{job.name} of {', '.join(names)}"] if names else []
    if not shaky:
        return []
    return [
        f"**Unsteady**: the quartiles lie more than {STEADY:.0%} of the median apart in {'; '.join(shaky)}."
        " Something else kept the machine busy; measure again."
    ]


def _notes(run):
    notes = [*losses(run.jobs), *_unsteady(run)]
    if run.interrupted:
        notes.append("**Interrupted**: the figures are those of the rounds until then.")
    notes += [f"**Absent.** {text}" for text in run.absent]
    problems = [(job.name, peer.problem) for job in run.jobs for peer in job.peers if peer.problem]
    return notes + [f"**Problem.** {job}: {problem}" for job, problem in problems]


def _spread(rate):
    """Distance of the quartiles in medians."""
    return (rate.q3 - rate.q1) / rate.median if rate else 0
