"""Rewrite the README's table of throughput from the results of `make bench-all`.

FOLDER holds the results, as bench/results/MACHINE; it is this machine's where none is named.
"""

import dataclasses
import pathlib
import sys
import textwrap

from bench import RESULTS, ROOT
from bench.machine import describe
from bench.model.figures import ModelRun
from bench.parser import make_parser
from bench.record import read
from bench.report.model import losses, overview
from bench.report.parts import title

README = ROOT / "README.md"
BEGIN, END = "<!-- throughput: begin -->\n", "<!-- throughput: end -->"
RIVALS, TRAINING = "rivals-base-float32.json", "training-base-float32.json"


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
    run = dataclasses.replace(inference, jobs=inference.jobs + training.jobs)
    versions = dict(item for peer in run.peers for item in peer.versions.items() if item[0] != "transformers")
    link = folder.resolve().relative_to(ROOT).as_posix() if folder.resolve().is_relative_to(ROOT) else folder.name
    paragraphs = [
        f"{title(run)}; {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))};"
        f" {run.date[:10]}. All peers ran in one process each, on the same weights and batches, outputs compared"
        " first. For erniem_fast real tokens per second, for the others how much faster erniem_fast is, and of those"
        " that round to 8 bits, how much faster erniem_fast is that does so too: median ratios of interleaved rounds."
        " A dash: it cannot train, or there was no memory for it.",
        overview(run.jobs),
        *losses(run.jobs),
        f"![rates by batch size, length and fill]({link}/{RIVALS.removesuffix('.json')}-curves.png)",
        f"Every round, memory, latencies, and what each kernel is worth: `{link}/`. `make bench-all` measures your"
        " machine, and `make readme` writes this section.",
    ]
    return "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def _wrapped(paragraph):
    """In lines of the README's width, unless it is a table or a picture, whose line must stay whole."""
    return paragraph if paragraph.startswith(("|", "!")) else textwrap.fill(paragraph, 120, break_long_words=False)
