"""Models of sentence-transformers before and after `optimize`, in Markdown and as pictures."""

import pathlib

from matplotlib.figure import Figure

from bench.model.figures import EncodeJob, EncodeRun, LinesFigures, LinesRun
from bench.report.labelled_bars import OTHERS, OURS, draw_bars
from bench.report.parts import contender, machine, table, title


def markdown(run: EncodeRun) -> str:
    """A table for each job, and who is missing."""
    method = (
        "The weights as XLM-RoBERTa, by `SentenceTransformer.encode` and `CrossEncoder.predict` in batches of 32, and"
        " by `erniem_fast.embed` and `score` in batches by tokens. Milliseconds: medians over rounds in turn, with"
        " quartiles. Difference: the largest from the stock model's results, over their root mean square."
        f" {run.date[:10]}."
    )
    absent = [f"**Absent.** {text}" for text in run.absent]
    return "\n\n".join([f"### sentence-transformers: {title(run)}", method, *map(_job, run.jobs), *absent]) + "\n"


def _job(job: EncodeJob) -> str:
    heading = f"**{job.name}**: {job.tokens:,} tokens in {job.items} rows; batches of 32 are {job.fill:.0%} full"
    rows = [contender(each) for each in job.contenders]
    return heading + "\n\n" + table(["", "ms", "times as fast as stock", "difference"], rows)


def plot(run: EncodeRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: for each job, how many times as fast as stock sentence-transformers' own call has become.

    `embed` and `score`, which do the same work by calls of ours, stand in the report.
    """
    figure = Figure(figsize=(13, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(run.jobs), squeeze=False)[0]
    for axis, job in zip(axes, run.jobs, strict=True):
        shown = [each for each in job.contenders if not each.name.startswith("erniem_fast.")]
        draw_bars(
            axis,
            [_way(each.name, run) if axis is axes[0] else "" for each in shown],  # all jobs have the same ways
            [each.speedup.median for each in shown],
            [f"{each.speedup.median:.1f}x, {_milliseconds(each.seconds.median)}" for each in shown],
            [OTHERS, *[OURS] * (len(shown) - 1)],
            [(each.speedup.q1, each.speedup.q3) for each in shown],
        )
        axis.set_xlabel("times as fast as stock")
        size = f"{job.items} rows, {job.tokens:,} tokens; batches {job.fill:.0%} full"
        axis.set_title(f"{job.name}\n{size if job.items > 1 else f'1 row, {job.tokens} tokens'}", fontsize=10)
    model = f"{run.settings.model} as XLM-RoBERTa in sentence-transformers, before and after optimize"
    note = "bars: median over rounds in turn, whiskers: quartiles"
    figure.suptitle(f"{model}\n{machine(run)}; {note}", fontsize=11)
    figure.savefig(path)


def _way(name: str, run: EncodeRun) -> str:
    """What a way is called beside its bar: the form of the weights, with its precision."""
    form = name.rpartition(", ")[2]
    names = {"stock": f"stock, {run.settings.dtype}", "packed": "optimized, packed float32"}
    return names.get(form, f"optimized, {form}")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds < 0.1 else f"{1e3 * seconds:,.0f} ms"


def lines_markdown(run: LinesRun) -> str:
    """A row for each number of lines and way."""
    method = (
        f"Lines of a file to vectors, after `optimize(model, weights={run.weights!r})`: by `SentenceTransformer.encode`"
        " of all lines at once, and by `erniem_fast.embed` of an iterator, whose results are written as they come."
        " Each in a process of its own, in turn. Memory: resident, when the model was loaded and at most."
        f" {run.date[:10]}."
    )
    rows = [_lines(each, run.results) for each in run.results]
    header = ["lines", "", "lines per second", "of encode's", "MiB, loaded", "MiB, peak"]
    return f"### Many lines: {title(run)}\n\n{method}\n\n{table(header, rows)}\n"


def _lines(one: LinesFigures, results: list[LinesFigures]) -> list[str]:
    encode = next(each for each in results if each.lines == one.lines)
    memory = [f"{each / 2**20:,.0f}" for each in (one.loaded_memory, one.peak_memory)]
    ratio = encode.median / one.median
    return [f"{one.lines:,}", one.way, f"{one.lines / one.median:,.0f}", f"{ratio:.2f}x", *memory]


def plot_lines(run: LinesRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: lines per second of each way, with the most memory that it had."""
    results = run.results
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(results)), dpi=110, layout="constrained")
    axis = figure.subplots()
    draw_bars(
        axis,
        [f"{each.lines:,} lines by {each.way}" for each in results],
        [each.lines / each.median for each in results],
        [f"{each.lines / each.median:,.0f} per second, {each.peak_memory / 2**20:,.0f} MiB" for each in results],
        [OURS if each.way == "embed" else OTHERS for each in results],
    )
    axis.set_xlabel("lines per second, median of the rounds, model already loaded; behind it the process's peak memory")
    precision = run.weights or run.settings.dtype
    model = f"{run.settings.model} as XLM-RoBERTa after optimize, {precision}"
    ways = "SentenceTransformer.encode beside erniem_fast.embed"
    figure.suptitle(f"Many lines to vectors: {ways}\n{model}\n{machine(run)}", fontsize=11)
    figure.savefig(path)
