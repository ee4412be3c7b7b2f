"""A run of the ops in Markdown and as a picture."""

import pathlib
from collections.abc import Iterator

from bench.kernels.figures import KernelRun, StepFigures
from bench.kernels.jobs import OURS
from bench.report.parts import COLOURS, table

MARKERS = "osD^vPX*"
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
    """Write the PNG `path`: for each size, how much of the floor each contender reaches. Needs matplotlib."""
    from matplotlib.figure import Figure

    results = [result for result in run.results if result.seconds]
    sizes = list(dict.fromkeys(result.size for result in results))
    lines = list(dict.fromkeys(map(_line, results)))
    names = list(dict.fromkeys(result.contender for result in results))
    figure = Figure(figsize=(4 + 5 * len(sizes), 2.2 + 0.25 * len(lines)), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axis, size in zip(axes, sizes, strict=True):
        for index, name in enumerate(names):
            own = [result for result in results if (result.size, result.contender) == (size, name)]
            # The first is ours: large and filled, so that it shows below those that are as fast, which are open.
            style = {"color": COLOURS[0], "s": 60} if name == OURS else {"facecolors": "none", "linewidths": 1.5}
            style |= {"edgecolors": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            shares = [100 * result.floor / result.seconds.median for result in own]
            axis.scatter(shares, [lines.index(_line(result)) for result in own], label=name, zorder=3, **style)
        axis.axvline(100, color="black", linewidth=0.8)
        axis.set(title=f"{size} size", xlabel="floor / time, %; further right is better")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.margins(y=0.02)
    axes[0].set_yticks(range(len(lines)), lines)
    axes[0].invert_yaxis()
    figure.suptitle(_heading(run, results), fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _line(result):
    what = result.op
    if what == "attention":
        what += ", ragged" if result.lengths == "ragged" else f", {result.lengths} tokens each"
    return f"{what}: {result.step}"


def _heading(run, results):
    copy, product = run.rates.bytes_per_second / 1e9, run.rates.flops_per_second / 1e12
    text = (
        f"{title(run)}, {max(result.tokens for result in results):,} tokens\n"
        f"100 % is the floor: a copy at {copy:,.0f} GB/s, or a matrix product at {product:,.3g} TFLOP/s"
    )
    if any(result.floor > result.seconds.median for result in results):
        text += "\nBeyond it: these tensors fit into the caches, and those of the measured copy do not."
    return text
