"""Rewrite the figures of README.md and docs/benchmarks.md, and draw the README's picture, from `make bench-all`.

FOLDER holds the results, as bench/results/MACHINE; it is this machine's where none is named.
"""

import dataclasses
import pathlib
import sys
import textwrap

from bench import RESULTS, ROOT
from bench.machine import describe
from bench.model.figures import JobFigures, ModelRun, QualityRun, is_rival
from bench.parser import make_parser
from bench.record import read
from bench.report import headline
from bench.report.model import losses, overview
from bench.report.parts import table, title
from bench.report.quality import COLUMNS as QUALITY_COLUMNS
from bench.report.quality import cells as quality_cells

README, BENCHMARKS = ROOT / "README.md", ROOT / "docs/benchmarks.md"
HEADLINE = "headline.png"
ROUNDED_JOBS = ("32 x text", "32 x sorted")
RIVALS, TRAINING, ROUNDED = (f"{name}-base-float32.json" for name in ("rivals", "training", "rounded"))
QUALITY = "quality-multilingual-e5-small-float32.json"


def main(argv: list[str] | None = None) -> int:
    """Rewrite both pages; returns the exit code 0."""
    parser = make_parser("readme", __doc__)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, metavar="FOLDER", help="default: bench/results/MACHINE")
    folder = parser.parse_args(argv).folder or RESULTS / describe("cpu").slug
    missing = [name for name in (RIVALS, TRAINING) if not (folder / name).exists()]
    if missing:
        sys.exit(f"python -m bench readme: {folder} holds no {' and no '.join(missing)}; `make bench-all` makes them")
    headline.plot(read(ModelRun, folder / RIVALS), folder / HEADLINE)
    _rewrite(README, {"speed": speed(folder), "rounded": rounded(folder)})
    _rewrite(BENCHMARKS, {"throughput": throughput(folder)})
    return 0


def _rewrite(page: pathlib.Path, sections: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for name, section in sections.items():
        text = replaced(text, name, section)
    page.write_text(text, encoding="utf-8")


def replaced(text: str, name: str, section: str) -> str:
    """`text` with what stands between the markers of `name` replaced by `section`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + section + end + after


def speed(folder: pathlib.Path) -> str:
    """The README's picture, and in words how far the best rival is and where it is ahead."""
    rivals, training = (read(ModelRun, folder / name) for name in (RIVALS, TRAINING))
    others = sum(is_rival(peer.name) for peer in rivals.peers)
    nearest = "; ".join(_nearest(job) for job in rivals.jobs if job.name in headline.JOBS)
    words = [
        f"How much faster erniem_fast is than the fastest of {others} others: {nearest}.",
        _behind(all_of(folder).jobs),
        *map(_training, training.jobs),
        "Every rival, job and precision: [benchmarks](docs/benchmarks.md).",
    ]
    picture = f"![rates and memory of erniem_fast and three others in three jobs]({link(folder)}/{HEADLINE})"
    return _paragraphs(picture, " ".join(words))


def _nearest(job: JobFigures) -> str:
    peer = min(job.rivals, key=lambda peer: peer.speedup.median)
    return f"{headline.JOBS[job.name]}, {job.fill:.0%} full, {peer.speedup.median:.2f}x ({peer.peer})"


def _training(job: JobFigures) -> str:
    other = job.peers[1]
    return (
        f"A step of training on {job.batch_size} texts is {other.speedup.median:.1f} times as fast as in {other.peer},"
        f" with {other.memory_ratio or 1:.2f} times the memory."
    )


def _behind(jobs: list[JobFigures]) -> str:
    """In how many comparisons erniem_fast is slower, the worst ratio, and how full those batches are at least."""
    compared = [(job.fill, peer.speedup.median) for job in jobs for peer in job.rivals]
    lost = [(fill, ratio) for fill, ratio in compared if round(ratio, 2) < 1]
    if not lost:
        return f"It is faster in all {len(compared)} comparisons."
    fill, worst = min(fill for fill, _ in lost), min(ratio for _, ratio in lost)
    where = "full batches" if round(fill, 2) == 1 else f"batches that are {fill:.0%} full or more"
    return (
        f"**It is slower in {len(lost)} of {len(compared)} comparisons**, {worst:.2f}x at the worst, all of them in"
        f" {where}."
    )


def rounded(folder: pathlib.Path) -> str:
    """The README's table of 16 and 8 bits: speed, memory and what rounding costs; without results, nothing."""
    if not ((folder / ROUNDED).exists() and (folder / QUALITY).exists()):
        return ""
    run, quality = read(ModelRun, folder / ROUNDED), read(QualityRun, folder / QUALITY)
    jobs = [job for job in run.jobs if job.name in ROUNDED_JOBS]
    rows = []
    for peer in quality.peers:
        measured = [next((each for each in job.peers if each.peer == peer.peer), None) for job in jobs]
        rows.append([peer.peer, *map(_rate, measured), _memory(measured[0]), *quality_cells(peer, quality.peers[0])])
    header = ["", *(f"tokens/s, {job.fill:.0%} full" for job in jobs), "memory", *QUALITY_COLUMNS]
    return _paragraphs(
        table(header, rows),
        f"Speed and memory: ERNIE-M {run.settings.model}, 32 texts at a time. Quality: {quality.settings.model},"
        f" {quality.sentences:,} sentences in {len(quality.pairs) + 1} languages; cosine of embeddings to those in"
        f" {quality.settings.dtype}, and in how many of 100 cases the nearest sentence of another language is the"
        " translation.",
    )


def _rate(peer):
    return f"{peer.tokens_per_second.median:,.0f}" if peer and peer.tokens_per_second else "-"


def _memory(peer):
    return f"{peer.peak_memory / 2**20:,.0f} MiB" if peer and peer.peak_memory else "-"


def throughput(folder: pathlib.Path) -> str:
    """The page of benchmarks: from where, the table, what is slower, pictures, and what rounding costs."""
    run, at = all_of(folder), f"../{link(folder)}"
    versions = dict(item for peer in run.peers for item in peer.versions.items() if item[0] != "transformers")
    pictures = [pathlib.Path(name).with_suffix(".png") for name in (RIVALS, ROUNDED) if (folder / name).exists()]
    paragraphs = [
        f"{title(run)}; {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))};"
        f" {run.date[:10]}. All peers ran in one process each, on the same weights and batches, outputs compared"
        " first. For erniem_fast real tokens per second, for the others how much faster erniem_fast is: `packed` than"
        " those that convert the weights for inference, `bfloat16` and `int8` than those that round alike; median"
        " ratios of interleaved rounds. A dash: it cannot train, or it was not measured.",
        overview(run),
        *losses(run.jobs),
        *(f"![rates of all, job by job]({at}/{name})" for name in pictures),
    ]
    if (folder / QUALITY).exists():
        paragraphs.append(f"![what rounding costs, by language]({at}/{pathlib.Path(QUALITY).with_suffix('.png')})")
    return _paragraphs(*paragraphs)


def all_of(folder: pathlib.Path) -> ModelRun:
    """Inference in every precision, and training, as one run."""
    inference, training = (read(ModelRun, folder / name) for name in (RIVALS, TRAINING))
    if (folder / ROUNDED).exists():
        inference = joined(inference, read(ModelRun, folder / ROUNDED))
    return dataclasses.replace(inference, jobs=inference.jobs + training.jobs)


def link(folder: pathlib.Path) -> str:
    """The folder as seen from the README."""
    return folder.resolve().relative_to(ROOT).as_posix() if folder.resolve().is_relative_to(ROOT) else folder.name


def joined(run: ModelRun, other: ModelRun) -> ModelRun:
    """`run` with the peers of `other` that it does not have itself, in every job of both."""
    known = {peer.name for peer in run.peers}
    added = {job.name: [peer for peer in job.peers if peer.peer not in known] for job in other.jobs}
    return dataclasses.replace(
        run,
        peers=run.peers + [peer for peer in other.peers if peer.name not in known],
        jobs=[dataclasses.replace(job, peers=job.peers + added.get(job.name, [])) for job in run.jobs],
    )


def _paragraphs(*paragraphs: str) -> str:
    """In lines of the pages' width, but for tables and pictures, whose lines must stay whole."""
    return "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def _wrapped(paragraph):
    if paragraph.startswith(("|", "!")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
