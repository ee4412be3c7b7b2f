"""The memory of a training step with the head for masked words, in Markdown."""

from bench.model.figures import MemoryFigures, MemoryRun
from bench.report.parts import table, title


def memory_markdown(run: MemoryRun) -> str:
    """A row for each class."""
    method = (
        f"A training step on {run.tokens:,} random tokens in rows of 512, 15 % of which are to be predicted, each class"
        f" in a process of its own. Memory in MiB. {run.date[:10]}."
    )
    rows = [_row(each, run.results[0]) for each in run.results]
    return f"### Memory: {title(run)}\n\n{method}\n\n{table(['', 'before', 'at most', 'ratio'], rows)}\n"


def _row(one: MemoryFigures, encoder: MemoryFigures) -> list[str]:
    memory = [f"{each / 2**20:,.0f}" for each in (one.loaded_memory, one.peak_memory)]
    return [one.name, *memory, f"{one.peak_memory / encoder.peak_memory:.2f}"]
