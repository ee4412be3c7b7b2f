"""`python -m erniem_fast extract`: a file of texts to a file of what a schema names in them."""

import argparse
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .. import resumable
from ..conversion.files import find_folder
from ..embedding.loading import check_device
from ..modeling import ErnieMForInformationExtraction
from ..tokenization import ErnieMTokenizer
from .extractor import Extractor
from .html import write_page
from .schema import LANGUAGES

# Texts are extracted from and written in groups of this many. A run that goes on begins with a whole group, so that
# batches, and with them the last digits, are those of a run in one go.
GROUP = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="a folder with a model and its tokenizer, or a name on the hub")
    parser.add_argument("--schema", required=True, type=Path, help="a JSON file: a name, a list or a dictionary")
    parser.add_argument("--input", required=True, type=Path, help=".txt (a text a line) or .jsonl (strings, or 'text')")
    parser.add_argument("--output", required=True, type=Path, help=".jsonl: the input's fields, with 'result' added")
    parser.add_argument("--html", type=Path, help="a page that shows the texts with what was found")
    parser.add_argument("--lang", choices=LANGUAGES, default="zh", help="of the schema (default: zh)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of starts and ends")
    parser.add_argument("--overlap", action="store_true", help="spans of one name may overlap")
    parser.add_argument("--max-length", type=int, help="tokens of a row")
    parser.add_argument("--split-sentence", action="store_true", help="look at each sentence alone")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a batch (default: 2048 on a CPU, 8192 elsewhere)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Extracts from the input, or what is left of it; returns the exit code."""
    return resumable.run(lambda: _run(arguments), arguments.output)


def _run(arguments: argparse.Namespace) -> str:
    if arguments.html is not None and arguments.html.resolve() in (
        arguments.input.resolve(),
        arguments.output.resolve(),
    ):
        raise ValueError(
            f"--html {arguments.html} would take the place of another file of the command; name a new one."
        )
    for _ in _items(arguments.input):  # before anything is computed, so that no work is lost for a bad line
        pass
    schema, folder = _read_schema(arguments.schema), find_folder(arguments.model)
    extractor = _load(folder, schema, arguments)
    files = ("command", "input", "output", "model", "html")
    options = {name: value for name, value in vars(arguments).items() if name not in files}
    description = resumable.describe(options | {"schema": schema}, model=folder, input=arguments.input)
    with resumable.ResumableOutput(arguments.output, description, ["lines"]) as output:
        items = itertools.islice(_items(arguments.input), output.rows, None)
        while group := list(itertools.islice(items, GROUP)):
            results = extractor([item["text"] for item in group])
            found = [item | {"result": result} for item, result in zip(group, results, strict=True)]
            output.append(len(found), lines=_encode(found))
        lines = output.folder / "lines"
        if arguments.html is not None:
            with lines.open(encoding="utf-8") as file:
                write_page(arguments.html, map(json.loads, file))
        output.finish(lambda whole: shutil.copyfile(lines, whole))
    return f"{arguments.output}: {output.rows} texts"


def _read_schema(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"--schema {path} is not JSON in UTF-8: {error}; correct the file, or save it as UTF-8."
        ) from None


def _load(folder: Path, schema: object, arguments: argparse.Namespace) -> Extractor:
    check_device(arguments.device)
    model = ErnieMForInformationExtraction.from_pretrained(folder).to(arguments.device).eval()
    names = ("lang", "threshold", "overlap", "max_length", "split_sentence", "batch_tokens")
    options = {name: getattr(arguments, name) for name in names}
    return Extractor(model, ErnieMTokenizer.from_pretrained(folder), schema, **options)


def _encode(items: Iterable[dict]) -> bytes:
    """Lines of JSON. A line with a lone surrogate, which UTF-8 cannot hold, is escaped."""
    return b"".join(_encode_line(item) + b"\n" for item in items)


def _encode_line(item: dict) -> bytes:
    try:
        return json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(item).encode()


def _items(path: Path) -> Iterator[dict]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--input {path}: name a file that ends in .txt (a text a line) or in .jsonl.")
    resumable.check_input(path)
    with path.open(encoding="utf-8-sig", newline="\n") as lines:  # Windows begins files by a mark, which is no text
        try:
            for number, line in enumerate(lines, 1):
                if path.suffix == ".txt":
                    yield {"text": line.rstrip("\r\n")}
                elif line.strip():
                    yield _item(path, number, line)
        except UnicodeDecodeError as error:
            raise ValueError(f"--input {path} is not UTF-8 ({error}); save it as UTF-8.") from None


def _item(path: Path, number: int, line: str) -> dict:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}; each line must be JSON.") from None
    item = {"text": item} if isinstance(item, str) else item
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise ValueError(f"{path}, line {number}: no text; write a string, or an object with a string as 'text'.")
    if "result" in item:
        raise ValueError(f"{path}, line {number}: 'result' is where --output gets what is found; rename the field.")
    return item
