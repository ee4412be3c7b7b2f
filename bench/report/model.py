"""The JSON of a run in Markdown, which reads as well in a terminal: tables, and in words what lost or failed."""

STEADY = 0.1  # on a quiet machine the quartiles lie 0.01 to 0.03 of the median apart


def title(run):
    settings, machine = run["settings"], run["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['instructions']}, {settings['threads']} threads"
    return f"ERNIE-M {settings['model']}, {settings['dtype']}, on {where}"


def markdown(run):
    """The whole report: what ran where, the table, and in words what went wrong or is slower."""
    parts = [f"### {title(run)}", _method(run), _peers(run), overview(run), _jobs(run), *_notes(run)]
    return "\n\n".join(parts) + "\n"


def breakdown_markdown(run):
    """A table for a forward and one for a step of training: what each op takes, and what it would take at the least."""
    rates = run["rates"]
    method = (
        f"{run['tokens']:,} real tokens in a batch that is {run['fill']:.0%} full. The floor is what an op would take"
        f" at {rates['operations_per_second'] / 1e9:,.0f} GFLOP/s, the measured rate of a large matrix product, or at"
        f" {rates['bytes_per_second'] / 1e9:,.1f} GB/s, that of a large copy, whichever is longer."
        " (A copy also fetches what it overwrites: AdamW, which works in place, can be faster.)"
    )
    steps = ("forward", "training")
    tables = [f"**{step.capitalize()}**: {_reached(run['reached'][step])}\n\n{_ops(run[step])}" for step in steps]
    return "\n\n".join([f"### Where the time goes: {title(run)}", method, *tables]) + "\n"


def _reached(step):
    took = f"{step['seconds'] * 1e3:,.1f} ms without the profiler"
    return f"{took}, in which its operations reach {step['share']:.0%} of that rate."


def _ops(rows):
    total = rows[-1]["seconds"]
    cells = [
        [
            row["op"],
            f"{row['seconds'] * 1e3:,.1f} ms",
            f"{row['seconds'] / total:.1%}",
            f"{row['floor'] * 1e3:,.1f} ms" if row["floor"] else "",
            f"{row['ratio']:.2f}x" if row["ratio"] else "",
        ]
        for row in rows
    ]
    return table(["op", "time", "share", "floor", "time / floor"], cells)


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
    return table(["who", "runs on", "start to ready", "first batch"], rows)


def overview(run):
    """A row for every peer and a column for every job: our rate, and for the others how much faster we are."""
    jobs = run["jobs"]
    names = list(dict.fromkeys(peer["peer"] for job in jobs for peer in job["peers"]))
    by_name = [{peer["peer"]: peer for peer in job["peers"]} for job in jobs]
    rows = [[name, *(_overview_cell(peers.get(name)) for peers in by_name)] for name in names]
    return table(["", *(f"{job['name']}, {job['fill']:.0%} full" for job in jobs)], rows)


def _overview_cell(peer):
    if peer is None or not peer["rounds"]:
        return "-"
    if peer["speedup"] is None:
        return f"{peer['tokens_per_second']['median']:,.0f} tokens/s"
    return f"{peer['speedup']['median']:.2f}x"


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
    return table(header, rows)


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


def table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


def losses(run):
    """In words, where erniem_fast is slower; a list of one paragraph or none."""
    slower = []
    for job in run["jobs"]:
        ratios = [(peer["peer"], peer["speedup"]["median"]) for peer in job["peers"] if peer["speedup"]]
        lost = [f"{name} ({ratio:.2f}x)" for name, ratio in ratios if round(ratio, 2) < 1]
        slower += [f"{job['name']} against {', '.join(lost)}"] if lost else []
    return [f"**erniem_fast is slower** in {'; '.join(slower)}."] if slower else []


def _unsteady(run):
    shaky = []
    for job in run["jobs"]:
        names = [peer["peer"] for peer in job["peers"] if _spread(peer["tokens_per_second"]) > STEADY]
        shaky += [f"{job['name']} of {', '.join(names)}"] if names else []
    if not shaky:
        return []
    return [
        f"**Unsteady**: the quartiles lie more than {STEADY:.0%} of the median apart in {'; '.join(shaky)}."
        " Something else kept the machine busy; measure again."
    ]


def _notes(run):
    notes = [*losses(run), *_unsteady(run)]
    if run["interrupted"]:
        notes.append("**Interrupted**: the figures are those of the rounds until then.")
    notes += [f"**Absent.** {text}" for text in run["absent"]]
    problems = [(job["name"], peer["problem"]) for job in run["jobs"] for peer in job["peers"] if peer["problem"]]
    return notes + [f"**Problem.** {job}: {problem}" for job, problem in problems]


def _spread(rate):
    """Distance of the quartiles in medians."""
    return (rate["q3"] - rate["q1"]) / rate["median"] if rate else 0
