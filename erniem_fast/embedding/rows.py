"""Texts, and their ids, in files: JSON lines, CSV, Parquet, or plain text with a text a line."""

import csv
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from ..resumable import check_input
from .tokens import NOT_UNICODE, is_unicode

FORMATS = (".jsonl", ".csv", ".parquet", ".txt")
SHOWN = 10  # as many bad rows are named
PARQUET_EXTRA = "Parquet needs pyarrow: pip install 'erniem-fast[embed]'"


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: where the row is, as errors name it.
        text: the text; empty if there is a problem.
        id: the id; None if the file is read without ids.
        problem: what is wrong with the row, and the remedy; None if nothing is.
    """

    place: str
    text: str
    id: str | int | None = None
    problem: str | None = None


class Source(NamedTuple):
    """A file of texts.

    Attributes:
        path: with one of FORMATS as suffix.
        column: the field of the texts; text files have none.
        id_column: the field of the ids; None if there are none to read.
    """

    path: Path
    column: str
    id_column: str | None = None

    def rows(self) -> Iterator[Row]:
        """All rows, also those with problems.

        Raises:
            ValueError: the file is missing, is of another format, lacks a column, or is broken beyond a row.
            ImportError: there is no pyarrow for Parquet.
        """
        if self.path.suffix not in FORMATS:
            raise ValueError(f"--input {self.path} must end in one of {', '.join(FORMATS)}.")
        if self.path.suffix == ".txt" and self.id_column is not None:
            raise ValueError(f"--id {self.id_column}: a text file has no ids; leave --id out, or use another format.")
        check_input(self.path)
        return _READERS[self.path.suffix](self)

    def check(self) -> int:
        """Reads all rows once, to see that each has a text; returns their number.

        Raises:
            ValueError: rows have problems; the first ones are named. Or as `rows`.
        """
        count, kind, bad = 0, None, []
        for row in self.rows():
            problem, count = row.problem, count + 1
            if problem is None and self.id_column is not None:
                kind = kind or type(row.id)
                if type(row.id) is not kind:
                    problem = f"its id {row.id!r} is no {kind.__name__}, as those before it; give all ids one type"
            if problem is not None:
                bad.append(f"{row.place}: {problem}")
        if bad:
            more = f"\n… and {len(bad) - SHOWN} rows more" if len(bad) > SHOWN else ""
            raise ValueError(f"{len(bad)} rows of {self.path} cannot be used:\n" + "\n".join(bad[:SHOWN]) + more)
        return count


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """The lines with their numbers, counted from 1, without their ends; None for what is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors begin files with
            try:
                yield number, line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError:
                yield number, None


_NOT_UTF8 = "it is not UTF-8; convert the file, for example with iconv"


def _text_rows(source: Source) -> Iterator[Row]:
    for number, line in _lines(source.path):
        place = f"line {number}"
        yield Row(place, "", problem=_NOT_UTF8) if line is None else Row(place, line)


def _json_rows(source: Source) -> Iterator[Row]:
    for number, line in _lines(source.path):
        place = f"line {number}"
        if line is None:
            yield Row(place, "", problem=_NOT_UTF8)
        elif line.strip():  # as other readers do, empty lines are passed over
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(place, "", problem=f"it is not JSON ({error}); write one object a line, without line breaks")
                continue
            if isinstance(fields, dict):
                yield _row(source, place, fields)
            else:
                yield Row(
                    place, "", problem=f"it is of type {type(fields).__name__}; write an object with {source.column!r}"
                )


def _csv_rows(source: Source) -> Iterator[Row]:
    reader = csv.DictReader(_csv_lines(source.path), strict=True)  # else a quote that is never closed eats what follows
    csv.field_size_limit(2**31 - 1)
    try:
        _check_columns(source, reader.fieldnames or [])
        while (fields := next(reader, None)) is not None:
            place = f"line {reader.line_num}"
            if reader.restkey in fields:
                yield Row(place, "", problem="it has more fields than the header; put texts with commas in quotes")
            else:
                yield _row(source, place, {name: each for name, each in fields.items() if each is not None})
    except csv.Error as error:
        raise ValueError(
            f"{source.path}, line {reader.line_num}: {error}; write the file with a CSV library."
        ) from error


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if line is None:
            raise ValueError(f"{path}, line {number}: {_NOT_UTF8}.")
        yield line + "\n"


def _parquet_rows(source: Source) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(PARQUET_EXTRA) from error
    file = pyarrow.parquet.ParquetFile(source.path)
    _check_columns(source, file.schema_arrow.names)
    columns = [name for name in (source.column, source.id_column) if name is not None]
    batches = file.iter_batches(batch_size=1024, columns=columns)
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, fields in enumerate(rows, 1):
        yield _row(source, f"row {number}", fields)


def _check_columns(source: Source, names: list[str]) -> None:
    for option, name in (("--column", source.column), ("--id", source.id_column)):
        if name is None or names.count(name) == 1:
            continue
        if name in names:
            raise ValueError(
                f"{option} {name}: {source.path} has {names.count(name)} columns of this name; rename one."
            )
        raise ValueError(f"{option} {name}: {source.path} has no such column; it has {', '.join(names) or 'none'}.")


def _row(source: Source, place: str, fields: dict) -> Row:
    """A row from its fields, with what is wrong with them."""
    text, id = fields.get(source.column), fields.get(source.id_column)
    if source.column not in fields:
        return Row(place, "", problem=f"it has no {source.column!r}; add it, or name another field with --column")
    if not isinstance(text, str):
        remedy = "write a string, or leave the row out"
        return Row(place, "", problem=f"its {source.column!r} is {text!r:.40}, of type {type(text).__name__}; {remedy}")
    if not is_unicode(text):
        return Row(place, "", problem=f"its {source.column!r} has {NOT_UNICODE}")
    problem = None if source.id_column is None else _problem_of_id(id)
    if problem is not None:
        return Row(place, "", problem=f"its {source.id_column!r} {problem}")
    return Row(place, text, id)


def _problem_of_id(id: object) -> str | None:
    """Why Parquet cannot hold an id; None if it can."""
    if not isinstance(id, str | int) or isinstance(id, bool):
        return f"is {id!r:.40}; ids must be strings or integers"
    if isinstance(id, int) and not -(2**63) <= id < 2**63:
        return f"is {id}, which has more than 64 bits with its sign; write ids as strings"
    return None if isinstance(id, int) or is_unicode(id) else f"has {NOT_UNICODE}"


_READERS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _text_rows}


def skip(rows: Iterator[Row], count: int) -> Iterator[Row]:
    """The rows after the first `count`."""
    return islice(rows, count, None)
