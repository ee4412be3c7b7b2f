"""`python -m erniem_fast embed`: a file of texts to a file of vectors."""

import argparse
import hashlib
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

import erniem_fast

from .batches import TOKENS_PER_BATCH
from .job import Job, partial_folder
from .loading import DTYPES, find_folder, load
from .pooling import POOLINGS
from .rows import Row, Source, skip
from .vectors import embed

SMALL = 2**20  # models' files up to this size are compared whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="a folder with a model and its tokenizer, or a name on the hub")
    parser.add_argument(
        "--input", required=True, type=Path, help="a file .jsonl, .csv, .parquet, or .txt (a text a line)"
    )
    parser.add_argument("--output", required=True, type=Path, help="a file .parquet, or .npy for the vectors alone")
    parser.add_argument("--column", default="text", help="the field of the texts (default: text)")
    parser.add_argument("--id", help="a field to write beside the vectors; strings or integers, for .parquet")
    parser.add_argument(
        "--weights", choices=["packed", "bfloat16", "int8", "float8"], help="as of erniem_fast.optimize"
    )
    parser.add_argument("--pooling", choices=POOLINGS, help="mean by default; a SentenceTransformer has its own")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="give vectors length 1")
    parser.add_argument("--prompt", help="put before each text")
    parser.add_argument("--prompt-name", help="one of a SentenceTransformer's prompts")
    parser.add_argument("--max-length", type=int, help="tokens at which texts are cut off")
    parser.add_argument("--tokens-per-batch", type=int, default=TOKENS_PER_BATCH, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")


def run(arguments: argparse.Namespace) -> int:
    """Embeds the input, or what is left of it; returns the exit code."""
    try:
        rows = _run(arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        folder = partial_folder(arguments.output)
        if isinstance(error, OSError) and folder.is_dir():  # a full disk, for example
            print(f"Start the same command again to go on from {folder}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"Stopped; start the same command again to go on from {partial_folder(arguments.output)}.", file=sys.stderr
        )
        return 130
    print(f"{arguments.output}: {rows} rows")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    source = Source(arguments.input, arguments.column, arguments.id)
    if arguments.id is not None and arguments.output.suffix != ".parquet":
        raise ValueError(f"--id {arguments.id}: only .parquet holds ids; leave --id out, or name such an --output.")
    total = source.check()  # before anything is computed, so that no work is lost for a bad row
    model, tokenizer = load(arguments.model, arguments.weights, arguments.device, arguments.dtype)
    names = ("pooling", "normalize", "prompt", "prompt_name", "max_length", "tokens_per_batch")
    options = {name: getattr(arguments, name) for name in names} | {"tokenizer": tokenizer, "show_progress_bar": False}
    dimension = embed(model, [], **options).shape[1]
    with Job(arguments.output, _describe(arguments), dimension) as job:
        ids, rows = deque(), skip(source.rows(), job.rows)
        with tqdm(total=total, initial=job.rows, unit="rows", disable=None) as bar:
            for vectors in embed(model, _texts(rows, ids), **options):
                job.append(vectors, [ids.popleft() for _ in vectors])
                bar.update(len(vectors))
        if job.rows != total:
            raise ValueError(f"{source.path} had {total} rows and now has {job.rows}; it must not change meanwhile.")
        job.finish()
    return total


def _texts(rows: Iterator[Row], ids: deque) -> Iterator[str]:
    """The rows' texts; their ids are put aside."""
    for row in rows:
        ids.append(row.id)
        yield row.text


def _describe(arguments: argparse.Namespace) -> dict[str, object]:
    """What decides the bytes of the output, on one machine."""
    versions = {
        "erniem_fast": erniem_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    options = {
        name: value for name, value in vars(arguments).items() if name not in ("command", "input", "output", "model")
    }
    return {
        **options,
        "model": _digest_of_folder(find_folder(arguments.model)),
        "input": _digest(arguments.input),
        "versions": versions,
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(SMALL):
            digest.update(part)
    return digest.hexdigest()


def _digest_of_folder(folder: Path) -> str:
    """Of the files' names, their sizes and contents; of large ones, beginning and end for their contents."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SMALL))
            file.seek(max(0, size - SMALL))
            digest.update(file.read())
    return digest.hexdigest()
