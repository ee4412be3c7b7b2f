"""What rounding costs: ways to run the model in 16 and 8 bits beside float32, on real weights and real text.

Every sentence of bench/data/parallel.tsv, with "query: " before it, becomes the mean over its tokens' hidden states.
These embeddings are compared with those in float32 by their cosine, and by the translations that they find: English
sentences look for theirs among all of a language, and the other way round. It takes a few minutes on two cores.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from bench import INTERRUPTED, ROOT
from bench.model.checkpoint import read_config
from bench.model.figures import PeerQuality, QualityRun
from bench.model.jobs import pad
from bench.model.options import add_common_options, checkpoint_folder
from bench.model.retrieval import cosines, embed, retrieve
from bench.model.rivals import rivals
from bench.model.text import Translation, read_translations, text_encoder
from bench.model.workers import Peer, Worker, WorkerError, exports_folder
from bench.parser import make_parser
from bench.record import Settings, begin, stem_of, write
from bench.report.quality import markdown, plot
from erniem_fast.configuration import RESERVED_POSITIONS

REAL_WEIGHTS = ROOT / "build/multilingual-e5-small"
PREFIX = "query: "  # so this model was trained
BATCH_SIZE = 32
CALIBRATED = 8  # one of so many batches is calibrated on, where a peer does that


def main(argv: list[str] | None = None, peers: Sequence[Peer] | None = None) -> int:
    """Compare the peers; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        run_and_save(arguments, rivals("rounded", "cpu", "float32") if peers is None else peers)
    except (ValueError, WorkerError) as error:
        sys.exit(f"python -m bench quality: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("quality", __doc__)
    parser.add_argument(
        "--model",
        type=checkpoint_folder,
        default=str(REAL_WEIGHTS),
        metavar="DIR",
        help="folder of a real ERNIE-M checkpoint that embeds sentences, with its tokenizer (default: that which"
        " `make quality` makes)",
    )
    add_common_options(parser.add_argument_group("run"))
    parser.set_defaults(dtype="float32", device="cpu")
    return parser.parse_args(argv)


def run_and_save(arguments: argparse.Namespace, peers: Sequence[Peer]) -> None:
    """Compare the peers, print the report and write it.

    Args:
        arguments: of the command line.
        peers: the reference first.
    """
    run = compare(arguments, peers, read_translations())
    stem = stem_of(run, arguments.output)
    write(run, markdown(run), stem)
    plot(run, stem.with_suffix(".png"))


def compare(arguments: argparse.Namespace, peers: Sequence[Peer], rows: Sequence[Translation]) -> QualityRun:
    """What the peers' embeddings of `rows` are worth.

    Raises:
        WorkerError: the reference, the first of the peers, failed.
    """
    languages = group(rows)
    texts, lengths, batches = make_batches(arguments.model, rows)
    run = QualityRun(
        **vars(begin("quality", arguments)),
        sentences=len(texts),
        tokens=int(lengths.sum()),
        pairs={language: len(pairs) for language, pairs in languages.items()},
        absent=[],
        peers=[],
    )
    reference = None
    with exports_folder(batches[::CALIBRATED]) as exports:
        for number, peer in enumerate(peers, start=1):
            print(f"{peer.name}, {number} of {len(peers)}", file=sys.stderr)
            try:
                embeddings = embed(hidden_states(peer, batches, run.settings, arguments.model, exports), lengths)
            except WorkerError as error:
                if reference is None:
                    raise
                run.absent.append(f"{peer.name}: {error}")
                continue
            reference = embeddings if reference is None else reference
            run.peers.append(judge(peer.name, embeddings, reference, texts, languages))
    return run


def group(rows: Sequence[Translation]) -> dict[str, list[tuple[str, str]]]:
    """The pairs of English and translated sentences, by language."""
    languages = {}
    for row in rows:
        languages.setdefault(row.language, []).append((row.english, row.translation))
    return dict(sorted(languages.items()))


def make_batches(model: pathlib.Path, rows: Sequence[Translation]) -> tuple[list[str], np.ndarray, list[dict]]:
    """All sentences once, by length, so that the batches hold little padding; their lengths; and the batches."""
    texts = list(dict.fromkeys(text for row in rows for text in (row.english, row.translation)))
    encode = text_encoder(model, read_config(model)["max_position_embeddings"] - RESERVED_POSITIONS)
    encoded = sorted(zip(encode([PREFIX + text for text in texts]), texts, strict=True), key=lambda each: len(each[0]))
    ids, texts = map(list, zip(*encoded, strict=True))
    batches = [pad(ids[start : start + BATCH_SIZE]) for start in range(0, len(ids), BATCH_SIZE)]
    return texts, np.array([len(row) for row in ids]), batches


def hidden_states(peer: Peer, batches: list[dict], settings: Settings, model: pathlib.Path, exports: str) -> np.ndarray:
    """Those of all real tokens, `(tokens, features)`, as `peer` computes them in a process that ends with that."""
    options = {name: getattr(settings, name) for name in ("device", "dtype", "threads")}
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "output.npy")
        with contextlib.closing(Worker(peer, str(model), exports, **options)) as worker:
            worker.request("check", batches=batches, train=False, output=str(output))
        return np.load(output)


def judge(
    name: str, embeddings: np.ndarray, reference: np.ndarray, texts: list[str], languages: dict[str, list]
) -> PeerQuality:
    """The figures of one peer; `texts` names the rows of the embeddings."""
    near, by_text = cosines(embeddings, reference), dict(zip(texts, embeddings, strict=True))
    retrieval = {language: retrieve(pairs, by_text) for language, pairs in languages.items()}
    return PeerQuality(name, float(near.mean()), float(near.min()), retrieval)
