"""`python -m erniem_fast embed`: a file of texts to a file of vectors."""

import argparse
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import resumable
from ..conversion.files import find_folder
from . import vector_file
from .batches import TOKENS_PER_BATCH
from .loading import DTYPES, load
from .pooling import POOLINGS
from .rows import Row, Source, skip
from .vectors import embed


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
    """Embeds the rows that an earlier run has not embedded yet; returns the exit code."""
    return resumable.run(lambda: _run(arguments), arguments.output)


def _run(arguments: argparse.Namespace) -> str:
    vector_file.check(arguments.output)
    source = Source(arguments.input, arguments.column, arguments.id)
    if arguments.id is not None and arguments.output.suffix != ".parquet":
        raise ValueError(f"--id {arguments.id}: only .parquet holds ids; leave --id out, or name such an --output.")
    total = source.check()  # before anything is computed, so that no work is lost for a bad row
    model, tokenizer = load(arguments.model, arguments.weights, arguments.device, arguments.dtype)
    names = ("pooling", "normalize", "prompt", "prompt_name", "max_length", "tokens_per_batch")
    options = {name: getattr(arguments, name) for name in names} | {"tokenizer": tokenizer, "show_progress_bar": False}
    dimension = embed(model, [], **options).shape[1]
    with resumable.ResumableOutput(arguments.output, _describe(arguments), vector_file.PARTS) as output:
        ids, rows = deque(), skip(source.rows(), output.rows)
        with tqdm(total=total, initial=output.rows, unit="rows", disable=None) as bar:
            for vectors in embed(model, _texts(rows, ids), **options):
                output.append(len(vectors), **vector_file.encode(vectors, [ids.popleft() for _ in vectors]))
                bar.update(len(vectors))
        if output.rows != total:
            raise ValueError(f"{source.path} had {total} rows and now has {output.rows}; it must not change meanwhile.")
        output.finish(lambda whole: vector_file.write(whole, output.folder, total, dimension))
    return f"{arguments.output}: {total} rows"


def _texts(rows: Iterator[Row], ids: deque) -> Iterator[str]:
    """The rows' texts; their ids are put aside."""
    for row in rows:
        ids.append(row.id)
        yield row.text


def _describe(arguments: argparse.Namespace) -> dict[str, object]:
    files = ("command", "input", "output", "model")
    options = {name: value for name, value in vars(arguments).items() if name not in files}
    return resumable.describe(options, model=find_folder(arguments.model), input=arguments.input)
