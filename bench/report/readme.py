"""Rewrite the README's table of throughput from the results of `make bench-all`.

FOLDER holds the results, as bench/results/MACHINE; it is this machine's where none is named.
"""

import dataclasses
import pathlib
import sys
import textwrap

from bench import RESULTS, ROOT
from bench.machine import describe
from bench.model.figures import ModelRun, QualityRun
from bench.parser import make_parser
from bench.record import read
from bench.report.model import losses, overview
from bench.report.parts import title
from bench.report.quality import overview as quality_overview

README = ROOT / "README.md"
BEGIN, END = "<!-- throughput: begin -->\n", "<!-- throughput: end -->"
RIVALS, TRAINING, ROUNDED = (f"{name}-base-float32.json" for name in ("rivals", "training", "rounded"))
QUALITY = "quality-multilingual-e5-small-float32.json"


def main(argv: list[str] | None = None) -> int:
    """Rewrite the README; returns the exit code 0."""
    parser = make_parser("readme", __doc__)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, metavar="FOLDER", help="default: bench/results/MACHINE")
    folder = parser.parse_args(argv).folder or RESULTS / describe("cpu").slug
    missing = [name for name in (RIVALS, TRAINING) if not (folder / name).exists()]
    if missing:
        sys.exit(f"python -m bench readme: {folder} holds no {' and no '.join(missing)}; `make bench-all` makes them")
    README.write_text(replaced(README.read_text(encoding="utf-8"), section(folder)), encoding="utf-8")
    return 0


def replaced(text: str, section: str) -> str:
    """`text` with what stands between the markers replaced by `section`."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + section + END + after


def section(folder: pathlib.Path) -> str:
    """What stands between the markers: from where, the table, what is slower, and where the rest is to be found."""
    inference, training = (read(ModelRun, folder / name) for name in (RIVALS, TRAINING))
    pictures = [RIVALS]
    if (folder / ROUNDED).exists():
        inference = joined(inference, read(ModelRun, folder / ROUNDED))
        pictures.append(ROUNDED)
    run = dataclasses.replace(inference, jobs=inference.jobs + training.jobs)
    versions = dict(item for peer in run.peers for item in peer.versions.items() if item[0] != "transformers")
    link = folder.resolve().relative_to(ROOT).as_posix() if folder.resolve().is_relative_to(ROOT) else folder.name
    paragraphs = [
        f"{title(run)}; {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))};"
        f" {run.date[:10]}. All peers ran in one process each, on the same weights and batches, outputs compared"
        " first. For erniem_fast real tokens per second, for the others how much faster erniem_fast is: `packed` than"
        " those that convert the weights for inference, `bfloat16` and `int8` than those that round alike; median"
        " ratios of interleaved rounds. A dash: it cannot train, or it was not measured.",
        overview(run),
        *losses(run.jobs),
        *(f"![rates by batch size, length and fill]({link}/{pathlib.Path(name).stem}-curves.png)" for name in pictures),
        f"Every round, memory, latencies, and what each kernel is worth: `{link}/`. `make bench-all` measures your"
        " machine, and `make readme` writes this section.",
    ]
    if (folder / QUALITY).exists():
        paragraphs[-1:-1] = _quality(read(QualityRun, folder / QUALITY), link)
    return "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def joined(run: ModelRun, other: ModelRun) -> ModelRun:
    """`run` with the peers of `other` that it does not have itself, in every job of both."""
    known = {peer.name for peer in run.peers}
    added = {job.name: [peer for peer in job.peers if peer.peer not in known] for job in other.jobs}
    return dataclasses.replace(
        run,
        peers=run.peers + [peer for peer in other.peers if peer.name not in known],
        jobs=[dataclasses.replace(job, peers=job.peers + added.get(job.name, [])) for job in run.jobs],
    )


def _quality(run, link):
    return [
        f"What rounding costs, on the weights of {run.settings.model} and {run.sentences:,} sentences: the cosine of"
        " their embeddings to those in float32, and how often the nearest sentence of another language is the"
        " translation.",
        quality_overview(run),
        f"![retrieval by language]({link}/{pathlib.Path(QUALITY).stem}.png)",
    ]


def _wrapped(paragraph):
    """In lines of the README's width, unless it is a table or a picture, whose line must stay whole."""
    return paragraph if paragraph.startswith(("|", "!")) else textwrap.fill(paragraph, 120, break_long_words=False)
