"""The README's picture: a few rivals in a few jobs, and their memory."""

import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.model.figures import JobFigures, ModelRun
from bench.report.bars import NOTHING, OTHERS, OURS
from bench.report.parts import two_lines

# From the top. Of the runtimes that repack weights when they load them, these are the fastest with and without padding.
SHOWN = ("erniem_fast packed", "erniem_fast", "CTranslate2", "OpenVINO", "transformers 4.57.6")
JOBS = {
    "32 x text": "32 sentences as they come",
    "32 x sorted": "32 sentences of like length",
    "1 x text": "one sentence",
}


def plot(run: ModelRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: the rates of `SHOWN` in `JOBS`, and the peak memory in the first of these."""
    jobs = [job for job in run.jobs if job.name in JOBS]
    figure = Figure(figsize=(10, 6), dpi=130, layout="constrained")
    *rates, memory = figure.subplots(2, 2, sharey=True).flat
    for axis, job in zip(rates, jobs, strict=False):
        peers = _shown(job)
        each = [peer.tokens_per_second or NOTHING for peer in peers]
        whiskers = [[rate.median - rate.q1 for rate in each], [rate.q3 - rate.median for rate in each]]
        _draw(axis, peers, [rate.median for rate in each], [peer.speedup for peer in peers], whiskers)
        axis.set(title=f"{JOBS[job.name]}\n({job.fill:.0%} full)", xlabel="real tokens per second, longer is better")
    peers = _shown(jobs[0])
    _draw(memory, peers, [(peer.peak_memory or 0) / 2**20 for peer in peers], [None] * len(peers), None)
    memory.set(title=f"memory\n(batch {jobs[0].fill:.0%} full)", xlabel="peak of the process in MiB, shorter is better")
    rates[0].invert_yaxis()
    figure.suptitle(
        f"{two_lines(run)}\nmedians, whiskers: quartiles; in brackets: erniem_fast is so many times as fast, packed"
        " where the other packs too",
        fontsize=11,
    )
    figure.savefig(path)


def _shown(job: JobFigures):
    by_name = {peer.peer: peer for peer in job.peers}
    return [by_name[name] for name in SHOWN if name in by_name]


def _draw(axis, peers, lengths, speedups, whiskers):
    colours = [OURS if peer.peer.startswith("erniem_fast") else OTHERS for peer in peers]
    bars = axis.barh([peer.peer for peer in peers], lengths, xerr=whiskers, color=colours, error_kw={"capsize": 2})
    ratios = [f"  ({speedup.median:.2f}x)" if speedup else "" for speedup in speedups]
    figures = [f"{length:,.0f}" if length else "not measured" for length in lengths]
    axis.bar_label(bars, map(str.__add__, figures, ratios), padding=5, fontsize=9)
    axis.set_xlim(0, 1.65 * max(*lengths, 1))  # room for the figures beside the bars
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
