"""A file of vectors, in Parquet or NumPy's format, from the parts that a ResumableOutput collects."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .rows import PARQUET_EXTRA

FORMATS = (".parquet", ".npy")
PARTS = ("vectors", "ids")
ROW_GROUP = 8192


def check(output: Path) -> None:
    """Raises what `write` would, before hours of work.

    Raises:
        ValueError: the file has none of FORMATS as suffix.
        ImportError: there is no pyarrow for Parquet.
    """
    if output.suffix not in FORMATS:
        raise ValueError(f"--output {output} must end in {' or '.join(FORMATS)}.")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(PARQUET_EXTRA) from error


def encode(vectors: np.ndarray, ids: Sequence[str | int | None]) -> dict[str, bytes]:
    """PARTS of vectors, float32 `(rows, dimension)`, with an id each, or None where there are none."""
    lines = "" if all(id is None for id in ids) else "".join(f"{json.dumps(id)}\n" for id in ids)
    return {"vectors": vectors.astype("<f4").tobytes(), "ids": lines.encode()}


def write(whole: Path, folder: Path, rows: int, dimension: int) -> None:
    """Writes a file in the format of its suffix, from the PARTS in a folder."""
    (_write_npy if whole.suffix == ".npy" else _write_parquet)(whole, folder, rows, dimension)


def _write_npy(whole: Path, folder: Path, rows: int, dimension: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    with whole.open("wb") as file, (folder / "vectors").open("rb") as vectors:
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(vectors, file, 2**20)


def _write_parquet(whole: Path, folder: Path, rows: int, dimension: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    has_ids = (folder / "ids").stat().st_size > 0
    vector = pa.list_(pa.float32(), dimension)
    writer = None
    with (folder / "vectors").open("rb") as vectors, (folder / "ids").open() as ids:
        for _ in range(0, max(rows, 1), ROW_GROUP):
            flat = np.fromfile(vectors, "<f4", ROW_GROUP * dimension)
            columns = {"embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat), type=vector)}
            if has_ids:
                columns = {"id": pa.array(list(_take(ids, len(flat) // dimension)))} | columns
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(whole, table.schema)
            writer.write_table(table)
    writer.close()


def _take(lines: Iterator[str], count: int) -> Iterator[str | int]:
    for _ in range(count):
        yield json.loads(next(lines))
