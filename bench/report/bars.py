"""A run as bars: rates and peak memory of a few peers, or a panel of rates for every job of many."""

import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.model.figures import JobFigures, ModelRun
from bench.report.parts import COLOURS, form, two_lines
from bench.timing import Quartiles

OURS, OTHERS = COLOURS[0], "#BBBBBB"
GAP = 0.6  # between the groups of bars, in bars
COLUMNS = 2  # of panels; more would be too small to read on a page
LEGEND_COLUMNS = 4  # names in a row of the legend; a longer row would be cut off at both ends
TICKS = 4  # on an axis, at most: the numbers of more would overlap
NOTHING = Quartiles(0, 0, 0)


def plot_bars(run: ModelRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: one group of bars per job, one bar per peer, with quartiles and the ratio of the first.

    Jobs that an interruption left unmeasured are left out.
    """
    jobs = [job for job in run.jobs if any(peer.rounds for peer in job.peers)] or run.jobs
    names = [peer.peer for peer in jobs[0].peers]
    figure = Figure(figsize=(12, 1.8 + 0.4 * len(jobs) * (len(names) + GAP)), dpi=150, layout="constrained")
    rates, memories = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for i, name in enumerate(names):
        peers = [job.peers[i] for job in jobs]
        style = {"height": 0.9, "color": COLOURS[i % len(COLOURS)], "label": name}
        at = [j * (len(names) + GAP) + i for j in range(len(jobs))]
        _draw_rates(rates, at, peers, style)
        _draw_memories(memories, at, peers, style)
    middles = [j * (len(names) + GAP) + (len(names) - 1) / 2 for j in range(len(jobs))]
    rates.set_yticks(middles, [label(job) for job in jobs])
    rates.invert_yaxis()
    rates.set(xlabel="real tokens per second (bars: median, whiskers: quartiles)", title="Throughput: longer is better")
    memories.set(xlabel="peak memory while running, MiB", title="Memory: shorter is better")
    for axis in (rates, memories):
        axis.set_xlim(0, 1.55 * max(axis.get_xlim()[1], 1))  # room for the figures beside the bars
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_major_locator(MaxNLocator(TICKS))
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{two_lines(run)}\nin brackets: {names[0]} has so many times the speed, or the memory", fontsize=11
    )
    columns = min(LEGEND_COLUMNS, len(names))
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)


def _draw_rates(axis, at, peers, style):
    rates = [peer.tokens_per_second or NOTHING for peer in peers]
    whiskers = [[rate.median - rate.q1 for rate in rates], [rate.q3 - rate.median for rate in rates]]
    bars = axis.barh(at, [rate.median for rate in rates], xerr=whiskers, error_kw={"capsize": 2}, **style)
    ratios = [peer.speedup and peer.speedup.median for peer in peers]
    _write_figures(axis, bars, ratios)


def _draw_memories(axis, at, peers, style):
    bars = axis.barh(at, [(peer.peak_memory or 0) / 2**20 for peer in peers], **style)
    _write_figures(axis, bars, [peer.memory_ratio for peer in peers])


def _write_figures(axis, bars, ratios):
    """Beside each bar its length and, where there is one, the ratio of the first one's to it."""
    figures = [f"{length:,.0f}" if length else "not measured" for length in bars.datavalues]
    texts = [f"{text}  ({ratio:.2f}x)" if ratio else text for text, ratio in zip(figures, ratios, strict=True)]
    axis.bar_label(bars, texts, padding=6, fontsize=9)


def plot_panels(run: ModelRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: for every job a panel of bars, the fastest on top; erniem_fast's are blue."""
    jobs = run.jobs
    columns = min(COLUMNS, len(jobs))
    rows = -(-len(jobs) // columns)
    height = 1.2 + rows * (1.1 + 0.24 * len(jobs[0].peers))
    figure = Figure(figsize=(10, height), dpi=130, layout="constrained")
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i < len(jobs):
            _draw_panel(axis, jobs[i])
        else:
            axis.set_axis_off()
    ours = jobs[0].peers[0].peer
    meaning = f"in brackets: {ours} is so many times as fast, with its weights in the same form"
    heading = f"{_heading(run)}\nbars: median, whiskers: quartiles; {meaning}"
    figure.suptitle(heading, fontsize=11)
    figure.savefig(path)


def _heading(run):
    """The run and its precision, and where some peers round, where theirs stands."""
    rounded = any(form(peer.peer)[1] not in (None, "packed") for peer in run.jobs[0].peers)
    return two_lines(run).replace("\n", " or what a name ends with\n" if rounded else "\n")


def _draw_panel(axis, job):
    ours = job.peers[0].peer
    peers = sorted(job.peers, key=lambda peer: -peer.tokens_per_second.median if peer.rounds else 0)
    rates = [peer.tokens_per_second or NOTHING for peer in peers]
    whiskers = [[rate.median - rate.q1 for rate in rates], [rate.q3 - rate.median for rate in rates]]
    colours = [OURS if peer.peer.startswith(ours) else OTHERS for peer in peers]
    medians = [rate.median for rate in rates]
    bars = axis.barh([peer.peer for peer in peers], medians, xerr=whiskers, color=colours, error_kw={"capsize": 2})
    texts = [_figures(peer) for peer in peers]
    axis.bar_label(bars, texts, padding=5, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.7 * max(*medians, 1))  # room for the figures beside the bars
    axis.set_title(label(job), fontsize=10)
    axis.set_xlabel("real tokens per second; longer is better", fontsize=8)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(TICKS))
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _figures(peer):
    if not peer.rounds:
        return "not measured"
    ratio = f"  ({peer.speedup.median:.2f}x)" if peer.speedup else ""
    return f"{peer.tokens_per_second.median:,.0f}{ratio}"


def label(job: JobFigures) -> str:
    """What a job is, in two short lines."""
    kinds = {"text": "real text", "sorted": "text by length", "modernbert": "ModernBERT's lengths"}
    kind = kinds.get(job.lengths) or f"{job.lengths.removeprefix('fixed:')} tokens each"
    task = f"{job.name.partition(', ')[2]}, " if job.train else ""
    return f"{task}batch {job.batch_size}, {kind}\n({job.fill:.0%} full)"
