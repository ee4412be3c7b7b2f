"""A run against many rivals as curves: rates by batch size, by length and by fill."""

import itertools
import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.model.figures import ModelRun
from bench.report.parts import colours_of, form, title

MARKERS = "osD^vPX*"
LINES = {None: "-", "packed": ":", "bfloat16": "-.", "int8": "--", "float8": (0, (1, 3))}  # by the form of the weights


def plot_curves(run: ModelRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: rates by batch size, by length and by fill, a curve for every peer."""
    figure = Figure(figsize=(16, 5.5), dpi=130, layout="constrained")
    by_batch, by_length, by_fill = figure.subplots(1, 3, sharey=True)
    jobs = run.jobs
    _draw_curves(by_batch, [(job.batch_size, job) for job in jobs if job.lengths == "text"])
    by_batch.set(xlabel="rows in a batch of real text", ylabel="real tokens per second", title="By batch size")
    fixed = [(int(job.lengths.removeprefix("fixed:")), job) for job in jobs if job.lengths.startswith("fixed:")]
    _draw_curves(by_length, fixed)
    by_length.set(xlabel="tokens in every row, no padding", title="By length")
    _draw_curves(by_fill, [(100 * job.fill, job) for job in jobs if job.batch_size == 32])
    by_fill.set(xlabel="real tokens in a batch of 32, %", title="By fill")
    for axis in (by_batch, by_length):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted({x for line in axis.lines for x in line.get_xdata()})))
    for axis in (by_batch, by_length, by_fill):
        axis.xaxis.set_major_formatter("{x:.0f}")
    by_batch.yaxis.set_major_formatter("{x:,.0f}")
    by_batch.yaxis.set_major_locator(FixedLocator([n * 10**k for k in range(7) for n in (1, 2, 5)]))
    figure.suptitle(title(run), fontweight="bold")
    figure.legend(*by_batch.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def _draw_curves(axis, points):
    points = sorted(points, key=lambda point: point[0])
    names = [peer.peer for peer in points[0][1].peers] if points else []
    colours = colours_of(names) if names else {}
    markers = dict(zip(colours, itertools.cycle(MARKERS), strict=False))
    for i, name in enumerate(names):
        measured = [(x, job.peers[i]) for x, job in points if job.peers[i].rounds]
        rates = [peer.tokens_per_second.median for _, peer in measured]
        plain, weights = form(name)
        style = {"color": colours[plain], "marker": markers[plain], "label": name}
        style |= {"linewidth": 3, "zorder": 3} if i == 0 else {"linewidth": 1.2}
        axis.plot([x for x, _ in measured], rates, LINES[weights], **style)
    axis.set_yscale("log", base=2)
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
