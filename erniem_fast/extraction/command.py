"""`python -m erniem_fast extract`: a file of texts to a file of what a schema names in them."""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..modeling import ErnieMForInformationExtraction
from ..tokenization import ErnieMTokenizer
from .extractor import Extractor
from .html import write_page
from .partial import PartialFile
from .schema import LANGUAGES
from .scoring import BATCH_TOKENS

# Texts are extracted from and written in groups of this many. A run that goes on begins with a whole group, so that
# batches, and with them the last digits, are those of a run in one go.
GROUP = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="a folder with a model and its tokenizer, or a name on the hub")
    parser.add_argument("--schema", required=True, type=Path, help="a JSON file: a name, a list or a dictionary")
    parser.add_argument("--input", required=True, type=Path, help=".txt (a text a line) or .jsonl (strings, or 'text')")
    parser.add_argument("--output", required=True, type=Path, help=".jsonl: the input's fields, and 'result'")
    parser.add_argument("--html", type=Path, help="a page that shows the texts with what was found")
    parser.add_argument("--lang", choices=LANGUAGES, default="zh", help="of the schema (default: zh)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of starts and ends")
    parser.add_argument("--overlap", action="store_true", help="spans of one name may overlap")
    parser.add_argument("--max-length", type=int, help="tokens of a row")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Extracts from the input, or what is left of it; returns the exit code."""
    try:
        count = _run(arguments)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; start the same command again to go on.", file=sys.stderr)
        return 130
    print(f"{arguments.output}: {count} texts")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    for _ in _items(arguments.input):  # before anything is computed, so that no work is lost for a bad line
        pass
    model = ErnieMForInformationExtraction.from_pretrained(arguments.model).to(arguments.device).eval()
    tokenizer = ErnieMTokenizer.from_pretrained(arguments.model)
    options = {
        name: getattr(arguments, name) for name in ("lang", "threshold", "overlap", "max_length", "batch_tokens")
    }
    schema = json.loads(arguments.schema.read_text(encoding="utf-8"))
    extractor = Extractor(model, tokenizer, schema, **options)
    description = {**options, "schema": schema, "model": arguments.model, "input": _digest(arguments.input)}
    with PartialFile(arguments.output, description, GROUP) as output:
        items = itertools.islice(_items(arguments.input), output.lines, None)
        while group := list(itertools.islice(items, GROUP)):
            results = extractor([item["text"] for item in group])
            output.append(item | {"result": result} for item, result in zip(group, results, strict=True))
        output.finish()
    if arguments.html is not None:
        write_page(arguments.html, (json.loads(line) for line in arguments.output.open(encoding="utf-8")))
    return output.lines


def _items(path: Path) -> Iterator[dict]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--input {path}: name a file that ends in .txt (a text a line) or in .jsonl.")
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if path.suffix == ".txt":
                yield {"text": line.rstrip("\r\n")}
            elif line.strip():
                yield _item(path, number, line)


def _item(path: Path, number: int, line: str) -> dict:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}; each line must be JSON.") from None
    item = {"text": item} if isinstance(item, str) else item
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise ValueError(f"{path}, line {number}: no text; write a string, or an object with a string as 'text'.")
    return item


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
