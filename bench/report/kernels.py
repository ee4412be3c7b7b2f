"""A run of the ops in Markdown and as a picture."""

import pathlib
from collections.abc import Iterator

from bench.kernels.figures import KernelRun, StepFigures
from bench.kernels.jobs import OURS
from bench.report.parts import COLOURS, table

HOST = 4  # the column of the host's time, which only a GPU has


def title(run: KernelRun) -> str:
    return f"The ops in {run.settings.dtype} on {run.machine.gpu or run.machine.cpu}"


def markdown(run: KernelRun) -> str:
    """The whole report: what ran, the table, and in words what lost or failed."""
    rates, settings = run.rates, run.settings
    method = (
        f"Medians and quartiles of {settings.rounds} rounds, contenders in turn, results compared with float64 first;"
        f" ratios are taken round by round. A floor is what a copy at {rates.bytes_per_second / 1e9:,.0f} GB/s or a"
        f" matrix product at {rates.flops_per_second / 1e12:,.2f} TFLOP/s takes, both measured here. torch"
        f" {settings.torch}. {run.date[:10]}."
    )
    ours = ", ".join(f"{op} by {name}" for op, name in run.implementations.items())
    steps = "\n".join(f"* {name}: {meaning}" for name, meaning in settings.steps.items())
    blocks = [f"### {title(run)}", method, f"erniem_fast runs {ours}.", steps, _results(run), *_notes(run)]
    return "\n\n".join(blocks) + "\n"


def _results(run):
    header = ["op", "step", "who", "microseconds (quartiles)", "host us", "floor / time", "time / ours"]
    rows, before = [], None
    for result in run.results:
        job = f"{result.op}, {result.size}, {result.lengths}, {result.tokens:,} tokens"
        rows.append([job if job != before else "", *_cells(result)])
        before = job
    if not any(result.host for result in run.results):  # on a CPU
        header, *rows = (row[:HOST] + row[HOST + 1 :] for row in (header, *rows))
    return table(header, rows)


def _cells(result: StepFigures) -> list[str]:
    seconds, speedup = result.seconds, result.speedup
    step = f"{result.step} (floor {result.floor * 1e6:,.1f})"
    if seconds is None:
        return [step, result.contender, "not measured", "", "", ""]
    median, q1, q3 = (f"{value * 1e6:,.1f}" for value in (seconds.median, seconds.q1, seconds.q3))
    return [
        step,
        result.contender,
        f"{median} ({q1}-{q3})",
        f"{result.host.median * 1e6:,.0f}" if result.host else "",
        f"{result.floor / seconds.median:.0%}",
        f"{speedup.median:.2f}x" if speedup else "",
    ]


def _notes(run: KernelRun) -> Iterator[str]:
    slower = [
        f"{result.op} {result.step}, {result.size}, {result.lengths}, against {result.contender}"
        f" ({result.speedup.median:.2f}x)"
        for result in run.results
        if result.speedup and round(result.speedup.median, 2) < 1
    ]
    if slower:
        yield f"**Ours is slower** in {'; '.join(slower)}."
    if run.left_out:
        yield f"**Left out** for lack of time: {'; '.join(run.left_out)}."
    if run.interrupted:
        yield "**Interrupted**: the rest is missing."
    for problem in dict.fromkeys(result.problem for result in run.results if result.problem):
        yield f"**Problem.** {problem}"


def plot(run: KernelRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: how much of the floor each contender reaches. Needs matplotlib."""
    from matplotlib.figure import Figure

    results = [result for result in run.results if result.seconds]
    lines = list(dict.fromkeys(_line(result) for result in results))
    figure = Figure(figsize=(10, 1.5 + 0.25 * len(lines)), dpi=150, layout="constrained")
    axis = figure.subplots()
    for index, name in enumerate(dict.fromkeys(result.contender for result in results)):
        own = [result for result in results if result.contender == name]
        shares = [100 * result.floor / result.seconds.median for result in own]
        places = [lines.index(_line(result)) for result in own]
        # On top, because one of the designs is what we run, and has the same point.
        axis.scatter(shares, places, color=COLOURS[index % len(COLOURS)], label=name, zorder=4 if name == OURS else 3)
    axis.set_yticks(range(len(lines)), lines)
    axis.invert_yaxis()
    axis.set(xlabel="floor / time, in % (the more the better)", title=title(run))
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    axis.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _line(result):
    return f"{result.op}, {result.size}, {result.lengths}: {result.step}"
