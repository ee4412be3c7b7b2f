"""Extraction by schema, in Markdown."""

from bench.model.figures import ExtractionRun, FineTuningRun, LongText
from bench.report.parts import contender, table, title


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
