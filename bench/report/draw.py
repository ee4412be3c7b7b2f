"""Draw the pictures of results again from the JSON that was kept, without measuring.

RESULT is a file such as bench/results/MACHINE/encode-multilingual-e5-small-float32.json; its pictures are written
beside it.
"""

import pathlib
import sys

from bench.kernels.figures import KernelRun
from bench.model.figures import (
    Breakdown,
    EncodeRun,
    ExtractionRun,
    FineTuningRun,
    LinesRun,
    ModelRun,
    PretrainingRun,
    QualityRun,
)
from bench.model.run import draw as draw_model
from bench.parser import make_parser
from bench.record import read
from bench.report import breakdown, extraction, kernels, pretraining, quality, sentence_transformers

# By the first word of a result's name: its dataclass, and what writes its picture. All others are runs of the model.
DRAWN = {
    "breakdown": (Breakdown, breakdown.plot),
    "encode": (EncodeRun, sentence_transformers.plot),
    "extraction": (ExtractionRun, extraction.plot),
    "finetuning": (FineTuningRun, extraction.plot_fine_tuning),
    "kernels": (KernelRun, kernels.plot),
    "lines": (LinesRun, sentence_transformers.plot_lines),
    "pretraining": (PretrainingRun, pretraining.plot),
    "quality": (QualityRun, quality.plot),
}
WITHOUT = ("memory", "newcomer", "sweep")  # tables alone


def main(argv: list[str] | None = None) -> int:
    """Draw the pictures of each result that `argv` names; returns the exit code 0."""
    parser = make_parser("draw", __doc__)
    parser.add_argument("results", nargs="+", type=pathlib.Path, metavar="RESULT")
    for path in parser.parse_args(argv).results:
        name = path.stem.partition("-")[0]
        if path.suffix != ".json" or not path.is_file() or name in WITHOUT:
            sys.exit(f"python -m bench draw: {path} is not the JSON of a result that has pictures")
        if name in DRAWN:
            kind, plot = DRAWN[name]
            plot(read(kind, path), path.with_suffix(".png"))
        else:
            draw_model(read(ModelRun, path), path.with_suffix(""))
    return 0
