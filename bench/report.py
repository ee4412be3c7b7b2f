"""The JSON of a run in Markdown, which reads as well in a terminal: tables, and in words what lost or failed."""

STEADY = 0.1  # on a quiet machine the quartiles lie 0.01 to 0.03 of the median apart


def title(run):
    settings, machine = run["settings"], run["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['instructions']}, {settings['threads']} threads"
    return f"ERNIE-M {settings['model']}, {settings['dtype']}, on {where}"


def markdown(run):
    """The whole report: what ran where, the table, and in words what went wrong or is slower."""
    return "\n\n".join([f"### {title(run)}", _method(run), _peers(run), _jobs(run), *_notes(run)]) + "\n"


def _method(run):
    rounds = sorted({max(len(peer["rounds"]) for peer in job["peers"]) for job in run["jobs"]})
    return (
        f"Medians and quartiles of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds of up to"
        f" {max(job['rows'] for job in run['jobs'])} rows, peers in turn; ratios are taken round by round. Padding"
        f" counts for nothing. Memory is that of the whole process, weights included. {run['date'][:10]}."
    )


def _peers(run):
    rows = [
        [
            peer["name"],
            ", ".join(f"{name} {version}" for name, version in peer["versions"].items()),
            f"{peer['load_seconds']:.1f} s",
            f"{peer['first_seconds']:.1f} s" if peer.get("first_seconds") else "",
        ]
        for peer in run["peers"]
    ]
    return _table(["who", "runs on", "start to ready", "first batch"], rows)


def _jobs(run):
    rows = []
    for job in run["jobs"]:
        label = f"{job['name']}, {job['fill']:.0%} full"
        for peer in job["peers"]:
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
    return _table(header, rows)


def _cells(peer):
    rate, speedup, memory = peer["tokens_per_second"], peer["speedup"], peer["memory_ratio"]
    batch = peer["batch_seconds"]
    return [
        peer["peer"],
        f"{rate['median']:,.0f} ({rate['q1']:,.0f}-{rate['q3']:,.0f})" if rate else "not measured",
        f"{peer['rows_per_second']:,.1f}" if rate else "",
        f"{batch['median'] * 1e3:,.0f} ({batch['p99'] * 1e3:,.0f})" if rate else "",
        f"{speedup['median']:.2f}x ({speedup['q1']:.2f}-{speedup['q3']:.2f})" if speedup else "",
        f"{peer['peak_memory'] / 2**20:,.0f} MiB" if peer["peak_memory"] else "",
        f"{memory:.2f}x" if memory else "",
    ]


def _table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


def _notes(run):
    entries = [(job["name"], peer) for job in run["jobs"] for peer in job["peers"]]
    slower = [
        f"{job} against {peer['peer']} ({peer['speedup']['median']:.2f}x)"
        for job, peer in entries
        if peer["speedup"] and round(peer["speedup"]["median"], 2) < 1
    ]
    unsteady = [f"{job} of {peer['peer']}" for job, peer in entries if _spread(peer["tokens_per_second"]) > STEADY]
    problems = [f"{job}: {peer['problem']}" for job, peer in entries if peer["problem"]]
    notes = []
    if slower:
        notes.append(f"**erniem_fast is slower** in {'; '.join(slower)}.")
    if unsteady:
        notes.append(
            f"**Unsteady**: the quartiles lie more than {STEADY:.0%} of the median apart in {'; '.join(unsteady)}."
            " Something else kept the machine busy; measure again."
        )
    if run["interrupted"]:
        notes.append("**Interrupted**: the figures are those of the rounds until then.")
    return notes + [f"**Absent.** {text}" for text in run["absent"]] + [f"**Problem.** {text}" for text in problems]


def _spread(rate):
    """Distance of the quartiles in medians."""
    return (rate["q3"] - rate["q1"]) / rate["median"] if rate else 0
