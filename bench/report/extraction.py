"""Extraction by schema, in Markdown and as pictures."""

import pathlib

from matplotlib.figure import Figure

from bench.model.figures import Contender, ExtractionRun, FineTuningRun, LongText
from bench.report.labelled_bars import OTHERS, OURS, draw_bars
from bench.report.parts import COLOURS, contender, table, title


def markdown(run: ExtractionRun) -> str:
    """A table of the two ways, and one of the long texts."""
    method = (
        f"Chinese and English sentences, six schemas: {run.rows} rows of prompt and text, {run.tokens:,} tokens in all,"
        f" which are {run.tokens / (512 * run.rows):.0%} of the rows padded to 512. Both ways find the same"
        f" {run.spans} spans. Milliseconds for all of it: medians over rounds in turn, with quartiles. Difference: the"
        f" largest of a probability. {run.date[:10]}."
    )
    ways = table(["", "ms", "times as fast as padded", "difference"], [contender(each) for each in run.contenders])
    long = (
        "**Long texts**, a schema of one name, each in a process of its own. Memory: resident, when the model was"
        " loaded, and at most above that."
    )
    header = ["characters", "tokens", "spans", "seconds", "tokens per second", "MiB, loaded", "MiB, more"]
    texts = table(header, [_long(each) for each in run.long_texts])
    return "\n\n".join([f"### Extraction: {title(run)}", method, ways, long, texts]) + "\n"


def _long(one: LongText) -> list[str]:
    counts = [f"{each:,}" for each in (one.characters, one.tokens, one.spans)]
    memory = [f"{each / 2**20:,.0f}" for each in (one.loaded_memory, one.peak_memory - one.loaded_memory)]
    return [*counts, f"{one.seconds:.1f}", f"{one.tokens / one.seconds:,.0f}", *memory]


def plot(run: ExtractionRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: the time of padded and of packed rows, and the memory of long texts."""
    figure = Figure(figsize=(13, 3.4), dpi=110, layout="constrained")
    ways, memory = figure.subplots(1, 2)
    measured = run.contenders
    draw_bars(
        ways,
        [each.name for each in measured],
        [each.seconds.median for each in measured],
        [f"{each.seconds.median:.1f} s{_times_as_fast(each)}" for each in measured],
        [OTHERS, *[OURS] * (len(measured) - 1)],
        [(each.seconds.q1, each.seconds.q3) for each in measured],
    )
    ways.set_xlabel("seconds, bars: median, whiskers: quartiles; shorter is better")
    fill = run.tokens / (512 * run.rows)
    ways.set_title(f"Six schemas: {run.rows} rows of prompt and text, {fill:.0%} full if padded to 512", fontsize=10)
    more = [(each.peak_memory - each.loaded_memory) / 2**20 for each in run.long_texts]
    draw_bars(
        memory,
        [f"{each.characters:,} characters" for each in run.long_texts],
        more,
        [f"{size:,.0f} MiB, {each.seconds:.1f} s" for size, each in zip(more, run.long_texts, strict=True)],
        OURS,
    )
    memory.set_xlabel("MiB above the loaded model; behind it the time")
    memory.set_title("One long text, a schema of one name, packed", fontsize=10)
    figure.suptitle(f"Extraction: {title(run)}", fontsize=11)
    figure.savefig(path)


def _times_as_fast(one: Contender) -> str:
    return f", {one.speedup.median:.1f}x as fast" if one.speedup.median != 1 else ""


def fine_tuning_markdown(run: FineTuningRun) -> str:
    """A row for each seed."""
    options = ", ".join(f"{name} {value:g}" for name, value in run.options.items())
    method = (
        "`examples/finetune_extraction.py`: trained on texts made from templates, tested on texts from three templates"
        " that it was not trained on. F1 of examples, each a prompt about a text; and of what `extract` finds by the"
        f" schema, relations included. {options}. {run.date[:10]}."
    )
    rows = [[str(each.seed), f"{each.examples:.3f}", f"{each.results:.3f}", f"{each.seconds:.0f}"] for each in run.runs]
    header = ["seed", "F1 of examples", "F1 of results", "seconds"]
    return f"### Fine-tuning to extract: {title(run)}\n\n{method}\n\n{table(header, rows)}\n"


def plot_fine_tuning(run: FineTuningRun, path: pathlib.Path) -> None:
    """Write the PNG `path`: both F1 of each seed."""
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    measured = {
        "of spans, each asked for by a prompt": [each.examples for each in run.runs],
        "of all that extract finds by the schema, relations included": [each.results for each in run.runs],
    }
    for i, (name, scores) in enumerate(measured.items()):
        bars = axis.bar([seed + 0.4 * (i - 0.5) for seed in range(len(scores))], scores, 0.38, color=COLOURS[i])
        bars.set_label(name)
        axis.bar_label(bars, fmt="{:.3f}", padding=2, fontsize=9)
    axis.set_xticks(range(len(run.runs)), [f"seed {each.seed}" for each in run.runs])
    axis.set(ylabel="F1", ylim=(0, 1.1), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        f"Fine-tuned to extract on {run.options['texts']:g} texts for {run.options['epochs']:g} epochs, tested on"
        f" templates that it was not trained on\n{title(run)}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
