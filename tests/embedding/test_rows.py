"""Texts in files, and what is wrong with some."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from erniem_fast.embedding.rows import Source, skip

TEXTS = ["a b", "", "línea\u2028x", '"q", z', "{}"]


def write(path, texts=TEXTS, ids=None):
    """A file of these texts, in the format of its suffix."""
    rows = [{"text": text, **({} if ids is None else {"key": ids[index]})} for index, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(f"{text}\n" for text in texts))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_texts_come_in_order(tmp_path, suffix):
    source = Source(write(tmp_path / f"a{suffix}"), "text")
    assert [row.text for row in source.rows()] == TEXTS
    assert source.check() == 5
    assert [row.text for row in skip(source.rows(), 3)] == TEXTS[3:]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("ids", [[7, 1, 2, 2**60, -1], ["x", "", "é", "1", "y"]], ids=["integers", "strings"])
def test_ids_come_beside_texts(tmp_path, suffix, ids):
    source = Source(write(tmp_path / f"a{suffix}", ids=ids), "text", "key")
    assert [row.id for row in source.rows()] == ids
    assert source.check() == 5


def test_ids_of_csv_are_strings(tmp_path):
    source = Source(write(tmp_path / "a.csv", ids=range(5)), "text", "key")
    assert [row.id for row in source.rows()] == ["0", "1", "2", "3", "4"]


def test_lines_that_break_inside_of_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\r\n"a\r\nb",1\r\nc,2\r\n')
    rows = list(Source(path, "text").rows())
    assert [(row.place, row.text) for row in rows] == [("line 3", "a\nb"), ("line 4", "c")]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".jsonl", b'{"text": "a"}\n{"tex": "b"}\n', r"line 2: it has no 'text'; add it, or name another"),
        (".jsonl", b'{"text": null}\n', r"line 1: its 'text' is None, of type NoneType; write a string"),
        (".jsonl", b'\n{"text": 3}\n', r"line 2: its 'text' is 3, of type int; write a string"),
        (".jsonl", b'["a"]\n', r"line 1: it is of type list; write an object with 'text'"),
        (".jsonl", b'{"text": "a"\n', r"line 1: it is not JSON \(Expecting ',' delimiter"),
        (".jsonl", b'{"text": "a \\ud800"}\n', r"line 1: its 'text' has half of a surrogate pair"),
        (".jsonl", b'{"text": "\xff"}\n', r"line 1: it is not UTF-8; convert the file"),
        (".jsonl", b'{"text": ' + b"[" * 100_000, r"line 1: it is not JSON \(maximum recursion"),
        (".csv", b"n,text\n1,a\n2,b, c\n", r"line 3: it has more fields than the header; put texts with"),
        (".csv", b'text\na\n"b\nc\n', r"a.csv, line 2: unexpected end of data"),
        (".csv", b"text,text\na,b\n", r"--column text: .*a.csv has 2 columns of this name"),
        (".csv", b"", r"--column text: .*a.csv has no such column; it has none"),
        (".csv", b"text,n\na,1\n\xff,2\n", r"a.csv, line 3: it is not UTF-8"),
        (".csv", b"n,text\n1,a\n2\n", r"line 3: it has no 'text'"),
        (".csv", b"a,b\n1,2\n", r"--column text: .*a.csv has no such column; it has a, b"),
        (".txt", b"a\n\xff\n", r"line 2: it is not UTF-8"),
        (".json", b"[]", r"--input .*a.json must end in one of .jsonl, .csv, .parquet, .txt"),
    ],
)
def test_bad_rows_are_named(tmp_path, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Source(path, "text").check()


def test_bad_rows_of_parquet(tmp_path):
    source = Source(write(tmp_path / "a.parquet", ["a", None, "c"]), "text")
    with pytest.raises(ValueError, match="row 2: its 'text' is None"):
        source.check()
    with pytest.raises(ValueError, match=r"--column other: .* it has text"):
        source._replace(column="other").check()


def test_the_first_bad_rows_are_listed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("x\n" * 12)
    with pytest.raises(ValueError, match=r"^12 rows of .*\nline 1: .*(\n.*){9}\n… and 2 rows more$"):
        Source(path, "text").check()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, "x", 4, 5], "line 3: its id 'x' is no int, as those before it"),
        ([1, True, 3, 4, 5], "line 2: its 'key' is True; ids must be strings or integers"),
        ([1, None, 3, 4, 5], "line 2: its 'key' is None; ids must be"),
        ([1, 2**63, 3, 4, 5], "line 2: its 'key' is 9223372036854775808, which has more than 64 bits"),
        (["1", "\ud800", "3", "4", "5"], "line 2: its 'key' has half of a surrogate pair"),
    ],
)
def test_bad_ids(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        Source(write(tmp_path / "a.jsonl", ids=ids), "text", "key").check()


def test_text_files_have_no_ids(tmp_path):
    with pytest.raises(ValueError, match="--id key: a text file has no ids"):
        Source(write(tmp_path / "a.txt"), "text", "key").check()
