"""Fine-tuning to extract: `examples/finetune_extraction.py` on a checkpoint, with a few seeds.

It trains all but the table of words on texts that are made from templates, and measures F1 on texts from other
templates. The example's defaults for a checkpoint were chosen on a part of the former that was left out of training,
never on those that are measured. It takes a minute or two for each seed on two cores.
"""

import argparse
import sys
import time
from importlib import import_module

import torch

from bench import INTERRUPTED, ROOT
from bench.model.figures import FineTuning, FineTuningRun
from bench.model.options import add_common_options, positive
from bench.model.sentence_transformers import add_model_option
from bench.parser import make_parser
from bench.record import begin, stem_of, write
from bench.report.extraction import fine_tuning_markdown, plot_fine_tuning

# Options of the example that a record names.
NAMED = ("texts", "epochs", "batch_size")


def main(argv: list[str] | None = None) -> int:
    """Measures; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        run = measure(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    stem = stem_of(run, arguments.output)
    write(run, fine_tuning_markdown(run), stem)
    plot_fine_tuning(run, stem.with_suffix(".png"))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("finetuning", __doc__)
    add_model_option(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs (default: 3)")
    group.add_argument("--texts", type=positive, metavar="N", help="to train on (default: the example's)")
    add_common_options(group)
    parser.set_defaults(dtype="float32", device="cpu")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> FineTuningRun:
    """All seeds, one after another."""
    run = FineTuningRun(**vars(begin("finetuning", arguments)), options={}, runs=[])
    torch.set_num_threads(run.settings.threads)
    example = load_example()
    words = ["--model", str(arguments.model), "--freeze-embeddings"]
    if arguments.texts:
        words += ["--texts", str(arguments.texts)]
    for seed in range(arguments.seeds):
        options = example.parse([*words, "--seed", str(seed)])
        run.options = {name: float(getattr(options, name)) for name in NAMED}
        start = time.perf_counter()
        scores = example.train(options)
        found = {name: scores[name]["f1"] for name in ("examples", "results")}
        run.runs.append(FineTuning(seed=seed, seconds=time.perf_counter() - start, **found))
    return run


def load_example():
    """The example, as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return import_module("finetune_extraction")
    finally:
        sys.path.pop(0)
