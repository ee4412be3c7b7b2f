"""End-to-end throughput of ERNIE-M: erniem_fast beside its rivals, on the same weights and batches, in one run.

Every peer runs in a process and an environment of its own. All are loaded at once, their outputs are compared on the
real tokens, and then they take turns, round after round, in alternating order. Reported are real tokens per second
(padding earns nothing), the ratio of ours to each peer (paired round by round) and the peak memory of each process.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile

import psutil
import torch
from tqdm import tqdm

from bench import ROOT
from bench.machine import available_cores
from bench.model.checkpoint import SIZES, random_checkpoint, read_config
from bench.model.jobs import Spec, make_jobs
from bench.model.measure import TOLERANCE, measure
from bench.model.rivals import OURS, OURS_INT8, rivals
from bench.model.summary import summarise
from bench.model.workers import Worker, WorkerError
from bench.record import begin, write
from bench.report.bars import plot
from bench.report.curves import plot_curves, plot_panels
from bench.report.model import markdown
from erniem_fast import ErnieMTokenizer

TOKENIZER = ROOT / "tests/golden/tiny"
MANY = 6  # peers in one group of bars


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_argument_group("jobs", "every batch size is run with every kind of lengths")
    jobs.add_argument("--batch-size", type=_positive, nargs="+", default=[32, 1], metavar="N", help="default: 32 1")
    jobs.add_argument(
        "--lengths",
        type=_lengths,
        nargs="+",
        default=["text", "fixed:32"],
        metavar="KIND",
        help="text: real sentences in 34 languages, cut at the model's maximum; sorted: the same by length; fixed:N:"
        " rows of N random tokens, no padding; modernbert: random tokens, lengths from N(256, 64) cut at the maximum"
        " (default: text fixed:32)",
    )
    jobs.add_argument(
        "--sentences",
        type=_positive,
        default=64,
        metavar="N",
        help="rows that a peer runs in one turn, in as many batches as they fill: 1 to 16 (default: 64)",
    )
    jobs.add_argument("--rounds", type=_positive, default=7, metavar="N", help="timed turns of each peer (default: 7)")
    jobs.add_argument(
        "--train", action="store_true", help="time steps of training: forward, backward and AdamW, with dropout"
    )
    jobs.add_argument(
        "--against",
        choices=["original", "all", "itself"],
        default="original",
        help="original: transformers 4.57.6; all: every rival; itself: erniem_fast with its kernels and its packing"
        " switched off (default: original)",
    )
    add_run_options(parser)
    return parser.parse_args(argv)


def add_run_options(parser):
    """The options that every run has: the model, and where and how it runs."""
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--size", choices=SIZES, default="base", help="random weights (default: base)")
    model.add_argument(
        "--model", type=_checkpoint, metavar="DIR", help="folder of a real ERNIE-M checkpoint with its tokenizer"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the weights (default: float32)")
    run.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    run.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of each peer (default: one per core)")
    run.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="folder for results (default: bench/results/MACHINE)"
    )


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _lengths(text):
    kind, _, number = text.partition(":")
    if text in ("text", "sorted", "modernbert") or (kind == "fixed" and number.isdecimal() and int(number) > 0):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of text, sorted, modernbert and fixed:N with N of 1 or more")


def _checkpoint(text):
    try:
        read_config(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return pathlib.Path(text)


def _device(text):
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} CUDA devices here, so no {text!r}")
    return text


def main(argv=None, peers=None):
    """Run the benchmark; returns the exit code: 0, 1 where a peer died or was refused, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    specs = [
        Spec(size, lengths, arguments.sentences, arguments.rounds, arguments.train)
        for size in arguments.batch_size
        for lengths in arguments.lengths
    ]
    if peers is None:
        peers = rivals(arguments.against, arguments.device, arguments.dtype)
    try:
        with checkpoint(arguments) as model:
            return run_and_save("training" if arguments.train else "throughput", arguments, model, peers, specs)
    except (ValueError, OSError) as error:
        sys.exit(f"throughput.py: {error}")


def checkpoint(arguments):
    """A context that lends the folder of the checkpoint that was asked for."""
    return contextlib.nullcontext(arguments.model) if arguments.model else random_checkpoint(arguments.size)


def run_and_save(name, arguments, model, peers, specs):
    """Measure, print the report and write it into files that start with `name`.

    Args:
        name: of what is measured.
        arguments: what `add_run_options` asks for.
        model: folder of the checkpoint.
        peers: who runs, ours first.
        specs: of the jobs.

    Returns:
        The exit code of `main`.
    """
    run = {**begin(name, arguments), **benchmark(arguments, model, peers, specs)}
    if run["jobs"]:
        draw(run, write(run, markdown(run), arguments.output))
    if run["interrupted"]:
        return 130
    return int(any(peer["problem"] for job in run["jobs"] for peer in job["peers"]))


def benchmark(arguments, model, peers, specs):
    """Measure the jobs of `specs` on the checkpoint in the folder `model`; returns the figures for JSON."""
    config = read_config(model)
    max_length = config["max_position_embeddings"] - 2
    jobs = make_jobs(specs, text_encoder(arguments.model or TOKENIZER, max_length), config["vocab_size"], max_length)
    run = {"peers": [], "absent": [], "interrupted": False}
    measurements, running = [], []
    with contextlib.ExitStack() as stack:
        try:
            peers = choose(peers, model, arguments.device, any(spec.train for spec in specs), run["absent"])
            running.extend(start(peers, arguments, model, run, stack))
            turns = sum(spec.rounds + 1 for spec in specs) * len(running)
            with tqdm(total=turns, unit="turn", disable=None) as bar:
                for job in jobs:
                    bar.write(f"{job.name}: {job.tokens:,} tokens in a turn", file=sys.stderr)
                    measure(job, running, arguments.dtype, measurements, bar)
        except KeyboardInterrupt:
            run["interrupted"] = True
    for worker, peer in zip(running, run["peers"], strict=False):
        peer["first_seconds"] = worker.first_seconds
    return {**run, "jobs": summarise(measurements, (OURS.name, OURS_INT8.name))}


def choose(peers, model, device, train, absent):
    """Yield the peers that can take part and for which there is memory; `absent` is told why the others cannot."""
    weights = sum(path.stat().st_size for path in model.iterdir())
    # Training holds weights, gradients and AdamW's two moments; the rest is for what happens between the layers.
    needed = 4 * weights + 2e9 if train else 1.3 * weights + 4e8
    free = psutil.virtual_memory().available
    for peer in peers:
        if train and not peer.trains:
            absent.append(f"{peer.name}: it cannot train")
        elif device == "cpu" and needed > free:
            absent.append(
                f"{peer.name}: all peers stay in memory, it needs about {needed / 1e9:.1f} GB and the others"
                f" leave {max(free, 0) / 1e9:.1f} GB"
            )
        else:
            free -= needed
            yield peer


def text_encoder(folder, max_length):
    """A function from texts to lists of token ids, `max_length` at most, with the tokenizer in `folder`."""
    tokenizer = ErnieMTokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


def start(peers, arguments, model, run, stack):
    """Yield a loaded worker for each peer, to be closed by `stack`; `run` is told of them and of those that fail."""
    exports = stack.enter_context(tempfile.TemporaryDirectory())
    threads = arguments.threads or available_cores()
    settings = {"device": arguments.device, "dtype": arguments.dtype, "threads": threads}
    for peer in peers:
        print(f"loading {peer.name}", file=sys.stderr)
        try:
            worker = stack.enter_context(contextlib.closing(Worker(peer, str(model), exports, **settings)))
        except WorkerError as error:
            run["absent"].append(f"{peer.name}: {error}")
            continue
        run["peers"].append({"name": peer.name, "versions": worker.versions, "load_seconds": worker.load_seconds})
        yield worker


def draw(run, stem):
    """Write the pictures of a run beside its other files."""
    many = len(run["jobs"][0]["peers"]) > MANY
    (plot_panels if many else plot)(run, stem.with_suffix(".png"))
    if many and len(run["jobs"]) > 1:
        plot_curves(run, stem.with_name(f"{stem.name}-curves.png"))


if __name__ == "__main__":
    sys.exit(main())
