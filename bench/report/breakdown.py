"""A breakdown in Markdown and as a picture."""

import pathlib

from matplotlib.figure import Figure

from bench.model.figures import Breakdown
from bench.report.parts import COLOURS, table, title, two_lines

# Why an op can take less time than its floor.
BEATEN = "A copy also fetches what it overwrites. An op that works in place does not, and can be below its floor."


def markdown(run: Breakdown) -> str:
    """A table for a forward and one for a step of training: what each op takes, and what it would take at the least."""
    rates = run.rates
    method = (
        f"{run.tokens:,} real tokens in a batch that is {run.fill:.0%} full. The floor is what an op would take"
        f" at {rates.flops_per_second / 1e9:,.0f} GFLOP/s, the measured rate of a large matrix product, or at"
        f" {rates.bytes_per_second / 1e9:,.1f} GB/s, that of a large copy, whichever is longer. {BEATEN}"
    )
    steps = ("forward", "training")
    tables = [f"**{step.capitalize()}**: {_reached(run.reached[step])}\n\n{_ops(getattr(run, step))}" for step in steps]
    return "\n\n".join([f"### Where the time goes: {title(run)}", method, *tables]) + "\n"


def _reached(step):
    took = f"{step.seconds * 1e3:,.1f} ms without the profiler"
    return f"{took}, in which its operations reach {step.share:.0%} of that rate."


def _ops(rows):
    total = rows[-1].seconds
    cells = [
        [
            row.op,
            f"{row.seconds * 1e3:,.1f} ms",
            f"{row.seconds / total:.1%}",
            f"{row.floor * 1e3:,.1f} ms" if row.floor else "",
            f"{row.ratio:.2f}x" if row.ratio else "",
        ]
        for row in rows
    ]
    return table(["op", "time", "share", "floor", "time / floor"], cells)


def plot(run: Breakdown, path: pathlib.Path) -> None:
    """Write the PNG `path`: for a forward and a step of training, what each op takes and what it would at the least."""
    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("forward", "training"), strict=True):
        *rows, total = getattr(run, name)
        at = range(len(rows))
        measured, floors = (
            [(value or 0) * 1e3 for value in values]
            for values in zip(*((row.seconds, row.floor) for row in rows), strict=True)
        )
        axis.barh(at, measured, color=COLOURS[0], label="measured")
        axis.barh(at, floors, height=0.4, color=COLOURS[1], label="floor of this machine")
        ratios = [f"{row.ratio:.1f}x the floor" if row.ratio else "" for row in rows]
        texts = [f"{row.seconds * 1e3:,.0f} ms  {ratio}" for row, ratio in zip(rows, ratios, strict=True)]
        ends = axis.barh(at, list(map(max, measured, floors)), alpha=0)
        axis.bar_label(ends, texts, padding=6, fontsize=9)
        axis.set_yticks(at, [row.op for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * max(axis.get_xlim()[1], 1))  # room for the figures beside the bars
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="milliseconds", title=f"{name.capitalize()}: {total.seconds * 1e3:,.0f} ms")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_heading(run), fontsize=11)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def _heading(run):
    rates = run.rates
    lines = [
        f"Where the time goes: {two_lines(run)}",
        f"batch {run.fill:.0%} full; the floor is that of {rates.flops_per_second / 1e9:,.0f} GFLOP/s (a large matrix"
        f" product) and {rates.bytes_per_second / 1e9:,.0f} GB/s (a large copy)",
    ]
    if any(row.ratio and row.ratio < 1 for row in (*run.forward[:-1], *run.training[:-1])):
        lines.append(BEATEN)
    return "\n".join(lines)
