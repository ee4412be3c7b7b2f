"""Many lines to vectors: sentence-transformers' encode beside `embed`, of the same optimised model, and their memory.

Each way runs in a process of its own, which reads the lines from a file and writes the vectors to one.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

import erniem_fast
from bench import INTERRUPTED, ROOT
from bench.difference import difference
from bench.model import faces
from bench.model.figures import LinesFigures, LinesRun
from bench.model.options import add_common_options, positive
from bench.model.quality import PREFIX
from bench.model.sentence_transformers import BATCH_SIZE, FORMS, LARGEST, add_model_option
from bench.model.text import read_translations
from bench.parser import make_parser
from bench.record import begin, stem_of, write
from bench.report.sentence_transformers import lines_markdown, plot_lines

WAYS = ("encode", "embed")


def main(argv: list[str] | None = None) -> int:
    """Measures; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        run = measure(arguments)
    except ValueError as error:
        sys.exit(f"python -m bench lines: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    stem = stem_of(run, arguments.output)
    write(run, lines_markdown(run), stem)
    plot_lines(run, stem.with_suffix(".png"))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("lines", __doc__)
    add_model_option(parser)
    group = parser.add_argument_group("run")
    counts = [10_000, 100_000]
    group.add_argument("--lines", type=positive, nargs="+", default=counts, metavar="N", help="default: 10000 100000")
    group.add_argument("--weights", choices=FORMS[1:], help="as of erniem_fast.optimize (default: the checkpoint's)")
    group.add_argument("--rounds", type=positive, default=1, metavar="N", help="of each way, in turn (default: 1)")
    add_common_options(group)
    parser.set_defaults(dtype="float32", device="cpu")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> LinesRun:
    """All ways on all numbers of lines.

    Raises:
        ValueError: the ways do not agree.
    """
    run = LinesRun(**vars(begin("lines", arguments)), weights=arguments.weights, results=[])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        faces.save(arguments.model, folder)
        for count in arguments.lines:
            write_lines(folder / "lines.txt", count)
            rounds = [one_round(folder, run, count) for _ in range(arguments.rounds)]
            run.results += [join([each[way] for each in rounds]) for way in WAYS]
    return run


def write_lines(path: pathlib.Path, count: int) -> None:
    """Sentences of all languages, each with a number, so that no two lines are the same."""
    texts = [row.translation.replace("\n", " ") for row in read_translations()]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{PREFIX}{texts[index % len(texts)]} {index}\n" for index in range(count))


def one_round(folder: pathlib.Path, run: LinesRun, count: int) -> dict[str, LinesFigures]:
    """Both ways once.

    Raises:
        ValueError: their vectors differ.
    """
    found = {}
    for way in WAYS:
        print(f"{count:,} lines by {way}", file=sys.stderr)
        command = [
            sys.executable,
            "-m",
            "bench.model.lines",
            way,
            str(folder),
            run.weights or "",
            str(run.settings.threads),
        ]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = LinesFigures(count, way, **json.loads(done.stdout))
    first, second = (torch.from_numpy(np.load(folder / f"{way}.npy", mmap_mode="r+")) for way in WAYS)
    off = difference(second, first)
    if not off <= LARGEST[run.weights]:
        raise ValueError(f"the vectors of {' and '.join(WAYS)} differ by {off:.2g} of their root mean square")
    return found


def join(rounds: list[LinesFigures]) -> LinesFigures:
    """The seconds of all rounds, and the most memory of any."""
    peak, loaded = (max(getattr(each, name) for each in rounds) for name in ("peak_memory", "loaded_memory"))
    seconds = [second for each in rounds for second in each.seconds]
    return LinesFigures(rounds[0].lines, rounds[0].way, seconds, loaded, peak)


def work(way: str, folder: str, weights: str, threads: str) -> dict[str, object]:
    """Embeds folder/lines.txt into folder/WAY.npy, in this process; returns the figures."""
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    model = erniem_fast.optimize(faces.load_encoder(folder / "bare"), weights=weights or None)
    model.encode(["a"] * BATCH_SIZE, show_progress_bar=False)
    loaded, start = peak_memory(), time.perf_counter()
    (_encode if way == "encode" else _embed)(model, folder)
    return {"seconds": [time.perf_counter() - start], "loaded_memory": loaded, "peak_memory": peak_memory()}


def _encode(model, folder: pathlib.Path) -> None:
    texts = (folder / "lines.txt").read_text(encoding="utf-8").splitlines()
    np.save(folder / "encode.npy", model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False))


def _embed(model, folder: pathlib.Path) -> None:
    count = 0
    with (folder / "lines.txt").open(encoding="utf-8") as lines, (folder / "embed").open("wb") as file:
        for vectors in erniem_fast.embed(model, (line.rstrip("\n") for line in lines), show_progress_bar=False):
            file.write(vectors.data)
            count += len(vectors)
    dimension = model.get_embedding_dimension()
    np.save(folder / "embed.npy", np.memmap(folder / "embed", np.float32, "r", shape=(count, dimension)))


def peak_memory() -> int:
    """Bytes that this process has had resident at most."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(work(*sys.argv[1:])))
