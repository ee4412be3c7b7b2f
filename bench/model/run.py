"""One run of the model: peers are started and measured, and what they did is reported and saved."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from bench import INTERRUPTED
from bench.machine import available_cores, available_memory
from bench.model.checkpoint import read_config
from bench.model.figures import LoadedPeer, ModelRun
from bench.model.jobs import Spec, make_jobs
from bench.model.measure import measure
from bench.model.rivals import OURS_NAMES
from bench.model.summary import summarise
from bench.model.text import TOKENIZER, text_encoder
from bench.model.workers import Peer, Worker, WorkerError, exports_folder
from bench.record import begin, stem_of, write
from bench.report.bars import plot_bars, plot_panels
from bench.report.model import markdown

MANY = 6  # peers in one group of bars


def run_and_save(
    name: str, arguments: argparse.Namespace, model: pathlib.Path, peers: Sequence[Peer], specs: Sequence[Spec]
) -> int:
    """Measure, print the report and write it into files that start with `name`.

    Args:
        name: of what is measured.
        arguments: what `add_run_options` asks for.
        model: folder of the checkpoint.
        peers: ours first.
        specs: of the jobs.

    Returns:
        The exit code: 0, 1 where a peer died or was refused, INTERRUPTED after Ctrl-C.
    """
    run = ModelRun(**vars(begin(name, arguments)), peers=[], absent=[], interrupted=False, jobs=[])
    benchmark(run, arguments, model, peers, specs)
    if run.jobs:
        stem = stem_of(run, arguments.output)
        write(run, markdown(run), stem)
        draw(run, stem)
    if run.interrupted:
        return INTERRUPTED
    return int(any(peer.problem for job in run.jobs for peer in job.peers))


def benchmark(
    run: ModelRun, arguments: argparse.Namespace, model: pathlib.Path, peers: Sequence[Peer], specs: Sequence[Spec]
) -> None:
    """Measure the jobs of `specs` on the checkpoint in the folder `model`, into `run`."""
    config = read_config(model)
    max_length = config["max_position_embeddings"] - 2
    jobs = make_jobs(specs, text_encoder(arguments.model or TOKENIZER, max_length), config["vocab_size"], max_length)
    measurements, workers = [], []
    with contextlib.ExitStack() as stack:
        try:
            able = choose(peers, model, arguments.device, any(spec.train for spec in specs), run.absent)
            workers.extend(start(able, arguments, model, run, stack, jobs[0].batches))
            turns = sum(spec.rounds + 1 for spec in specs) * len(workers)
            with tqdm(total=turns, unit="turn", disable=None) as bar:
                for job in jobs:
                    bar.write(f"{job.name}: {job.tokens:,} tokens in a turn", file=sys.stderr)
                    measure(job, workers, arguments.dtype, measurements, bar)
        except KeyboardInterrupt:
            run.interrupted = True
    for worker, peer in zip(workers, run.peers, strict=False):
        peer.first_seconds = worker.first_seconds
    run.jobs = summarise(measurements, OURS_NAMES)


def choose(peers: Iterable[Peer], model: pathlib.Path, device: str, train: bool, absent: list[str]) -> Iterator[Peer]:
    """Yield the peers that can take part and for which there is memory; `absent` is told why the others cannot."""
    weights = sum(path.stat().st_size for path in model.iterdir())
    # Training holds weights, gradients and AdamW's two moments; the rest is for what happens between the layers.
    needed = 4 * weights + 2e9 if train else 1.3 * weights + 4e8
    free = available_memory()
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


def start(
    peers: Iterable[Peer],
    arguments: argparse.Namespace,
    model: pathlib.Path,
    run: ModelRun,
    stack: contextlib.ExitStack,
    batches: list[dict],
) -> Iterator[Worker]:
    """Yield a loaded worker for each peer, to be closed by `stack`; `run` is told of them and of those that fail.

    Those that calibrate themselves do it on `batches`.
    """
    exports = stack.enter_context(exports_folder(batches))
    threads = arguments.threads or available_cores()
    settings = {"device": arguments.device, "dtype": arguments.dtype, "threads": threads}
    for peer in peers:
        print(f"loading {peer.name}", file=sys.stderr)
        try:
            worker = stack.enter_context(contextlib.closing(Worker(peer, str(model), exports, **settings)))
        except WorkerError as error:
            run.absent.append(f"{peer.name}: {error}")
            continue
        run.peers.append(LoadedPeer(peer.name, worker.versions, worker.load_seconds, load_memory=worker.load_memory))
        yield worker


def draw(run: ModelRun, stem: pathlib.Path) -> None:
    """Write the picture of a run beside its other files."""
    many = len(run.jobs[0].peers) > MANY
    (plot_panels if many else plot_bars)(run, stem.with_suffix(".png"))
