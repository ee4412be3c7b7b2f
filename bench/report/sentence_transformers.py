"""Models of sentence-transformers before and after `optimize`, in Markdown."""

from bench.model.figures import EncodeJob, EncodeRun, LinesFigures, LinesRun
from bench.report.parts import contender, table, title


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
