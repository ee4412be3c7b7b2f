"""All of the benchmark: every rival, training, erniem_fast without its kernels or packing, and where its time goes.

At its defaults it takes half an hour on two cores. Every part leaves JSON, Markdown and a picture behind when
it ends, and Ctrl-C keeps what was measured until then.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from bench import INTERRUPTED
from bench.model import breakdown
from bench.model.jobs import Spec
from bench.model.options import add_run_options, checkpoint
from bench.model.rivals import rivals
from bench.model.run import run_and_save
from bench.parser import make_parser

HEADLINE = Spec(32, "text", rows=64, rounds=7)
INFERENCE = (
    HEADLINE,
    Spec(1, "text", rows=16, rounds=5),
    Spec(8, "text", rows=32, rounds=3),
    Spec(32, "sorted", rows=64, rounds=3),
    Spec(32, "fixed:32", rows=32, rounds=3),
    Spec(8, "fixed:128", rows=8, rounds=3),
    Spec(2, "fixed:512", rows=2, rounds=3),
)
LARGE_BATCH = Spec(128, "text", rows=128, rounds=3)
TRAINING = (Spec(32, "text", rows=64, rounds=3, train=True),)
PARTS = (
    ("rivals", "unrounded", INFERENCE),
    ("rounded", "rounded", INFERENCE),
    ("training", "unrounded", TRAINING),
    ("ablation", "itself", (Spec(32, "text", rows=32, rounds=3), Spec(1, "text", rows=16, rounds=5))),
)
LONG_PARTS = (*PARTS, ("ablation-training", "itself", TRAINING))


def main(argv: list[str] | None = None) -> int:
    """Run all parts; returns the exit code: 0, 1 where a peer died or was refused, 130 after Ctrl-C."""
    parser = make_parser("everything", __doc__)
    parser.add_argument(
        "--long",
        action="store_true",
        help="7 rounds of everything, batches of 128, and training without each kernel: an hour and a half",
    )
    add_run_options(parser)
    arguments = parser.parse_args(argv)
    try:
        with checkpoint(arguments) as model:
            return run_parts(arguments, model)
    except (ValueError, OSError) as error:
        sys.exit(f"python -m bench everything: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED


def run_parts(arguments: argparse.Namespace, model: pathlib.Path) -> int:
    """Run and save one part after another, until one is interrupted; returns the worst exit code."""
    on_cpu = arguments.device == "cpu"
    parts = [part for part in (LONG_PARTS if arguments.long else PARTS) if on_cpu or part[1] != "rounded"]
    worst, count = 0, len(parts) + on_cpu
    for number, (name, against, specs) in enumerate(parts, start=1):
        _announce(number, count, name)
        peers = rivals(against, arguments.device, arguments.dtype)
        code = run_and_save(name, arguments, model, peers, lengthen(specs) if arguments.long else specs)
        if code == INTERRUPTED:
            return code
        worst = max(worst, code)
    if on_cpu:
        _announce(count, count, "breakdown")
        breakdown.run_and_save(arguments, model)
    return worst


def lengthen(specs: Sequence[Spec]) -> list[Spec]:
    """The jobs of a long run."""
    more = (LARGE_BATCH,) if specs is INFERENCE else ()
    return [dataclasses.replace(spec, rounds=HEADLINE.rounds) for spec in (*specs, *more)]


def _announce(number, count, name):
    print(f"\npart {number} of {count}, {time.strftime('%H:%M:%S')}: {name}", file=sys.stderr)
