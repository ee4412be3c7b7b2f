"""End-to-end throughput of ERNIE-M: erniem_fast beside its rivals, on the same weights and batches, in one run.

Every peer runs in a process and an environment of its own. All are loaded at once, their outputs are compared on the
real tokens, and then they take turns, round after round, in alternating order. Reported are real tokens per second
(padding earns nothing), the ratio of ours to each peer (paired round by round) and the peak memory of each process.
"""

import argparse
import sys
from collections.abc import Sequence

from bench.model.jobs import Spec
from bench.model.options import add_run_options, checkpoint, lengths, positive
from bench.model.rivals import rivals
from bench.model.run import run_and_save
from bench.model.workers import Peer
from bench.parser import make_parser


def main(argv: list[str] | None = None, peers: Sequence[Peer] | None = None) -> int:
    """Run the benchmark; returns the exit code: 0, 1 where a peer died or was refused, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    trains = arguments.train or arguments.masked
    specs = [
        Spec(size, lengths, arguments.sentences, arguments.rounds, trains, arguments.masked)
        for size in arguments.batch_size
        for lengths in arguments.lengths
    ]
    if peers is None:
        peers = rivals(arguments.against, arguments.device, arguments.dtype)
    try:
        with checkpoint(arguments) as model:
            kind = "masked-lm" if arguments.masked else "training" if arguments.train else "throughput"
            return run_and_save(kind, arguments, model, peers, specs)
    except (ValueError, OSError) as error:
        sys.exit(f"python -m bench throughput: {error}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("throughput", __doc__)
    jobs = parser.add_argument_group("jobs", "every batch size is run with every kind of lengths")
    jobs.add_argument("--batch-size", type=positive, nargs="+", default=[32, 1], metavar="N", help="default: 32 1")
    jobs.add_argument(
        "--lengths",
        type=lengths,
        nargs="+",
        default=["text", "fixed:32"],
        metavar="KIND",
        help="text: real sentences in 34 languages, cut at the model's maximum; sorted: the same by length; fixed:N:"
        " rows of N random tokens, no padding; modernbert: random tokens, lengths from N(256, 64) cut at the maximum"
        " (default: text fixed:32)",
    )
    jobs.add_argument(
        "--sentences",
        type=positive,
        default=64,
        metavar="N",
        help="rows that a peer runs in one turn, in as many batches as they fill: 1 to 16 (default: 64)",
    )
    jobs.add_argument("--rounds", type=positive, default=7, metavar="N", help="timed turns of each peer (default: 7)")
    jobs.add_argument(
        "--train", action="store_true", help="time steps of training: forward, backward and AdamW, with dropout"
    )
    jobs.add_argument(
        "--masked", action="store_true", help="the same with the loss of masked-language modelling, by XLM-R's head"
    )
    jobs.add_argument(
        "--against",
        choices=["original", "all", "unrounded", "rounded", "itself"],
        default="original",
        help="original: transformers 4.57.6; all: every rival; unrounded, rounded: those of them that keep the weights'"
        " precision, or that do not; itself: erniem_fast with its kernels and its packing switched off (default:"
        " original)",
    )
    add_run_options(parser)
    return parser.parse_args(argv)
