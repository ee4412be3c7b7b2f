"""A file of vectors that grows while texts are embedded, survives a stop at any point, and appears when it is whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .rows import PARQUET_EXTRA

FORMATS = (".parquet", ".npy")
ROW_GROUP = 8192


class Job:
    """The vectors of one run, in a folder beside the output until they are all there.

    Each `append` is on disk before it returns. A run that was stopped between two of them goes on after the last.

    Attributes:
        rows: the number of vectors that are on disk.
    """

    def __init__(self, output: Path, description: dict[str, object], dimension: int) -> None:
        """Starts a run, or goes on with one that was stopped.

        Args:
            output: the file to write, with one of FORMATS as suffix.
            description: what decides the vectors, in values of JSON.
            dimension: of the vectors.

        Raises:
            ValueError: the output is there already or has another suffix, its folder is missing, another process works
                on it, or the run that was stopped had another description or left a state that cannot be read.
            ImportError: there is no pyarrow for Parquet.
        """
        _check_output(output)
        self._output, self._dimension = output, dimension
        self._folder = partial_folder(output)
        self._folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, _lock(self._folder))
            state = _read_state(self._folder) or {"description": description, "rows": 0, "id_bytes": 0}
            _compare(self._folder, state["description"], description)
            self._description, self.rows, self._id_bytes = state.values()
            self._vectors = opened.enter_context(_open_at(self._folder / "vectors", self.rows * dimension * 4))
            self._ids = opened.enter_context(_open_at(self._folder / "ids", self._id_bytes))
            self._write_state()
            self._open = opened.pop_all()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files, which stay as they are."""
        self._open.close()

    def append(self, vectors: np.ndarray, ids: Sequence[str | int | None]) -> None:
        """Adds vectors, float32 `(rows, dimension)`, with an id each, or None where there are none."""
        self._vectors.write(np.ascontiguousarray(vectors, "<f4").data)
        if any(id is not None for id in ids):
            self._id_bytes += self._ids.write("".join(f"{json.dumps(id)}\n" for id in ids).encode())
        for file in (self._vectors, self._ids):
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(vectors)
        self._write_state()

    def finish(self) -> None:
        """Writes the output, which appears at once and whole, and removes all else."""
        whole = self._folder / f"whole{self._output.suffix}"
        (_write_npy if self._output.suffix == ".npy" else _write_parquet)(
            self._folder, whole, self.rows, self._dimension
        )
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self._output)
        shutil.rmtree(self._folder)

    def _write_state(self) -> None:
        state = {"description": self._description, "rows": self.rows, "id_bytes": self._id_bytes}
        new = self._folder / "state.json.new"
        with new.open("w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._folder / "state.json")


def partial_folder(output: Path) -> Path:
    """Where a run keeps what it has so far."""
    return output.with_name(output.name + ".partial")


def _check_output(output: Path) -> None:
    if output.suffix not in FORMATS:
        raise ValueError(f"--output {output} must end in {' or '.join(FORMATS)}.")
    if output.exists():
        raise ValueError(f"--output {output} is there already; remove it, or name another file.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first.")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 (before hours of work need it)
        except ImportError as error:
            raise ImportError(PARQUET_EXTRA) from error


def _lock(folder: Path) -> int:
    """Holds a file of the folder until the process ends, however it does."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    with contextlib.suppress(ImportError):  # Windows has no such locks
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ValueError(f"Another process works in {folder}; wait for it, or name another --output.") from error
    return lock


def _read_state(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / 'state.json'} is broken ({error}); remove the folder to begin anew.") from error


def _compare(folder: Path, before: dict[str, object], now: dict[str, object]) -> None:
    now = json.loads(json.dumps(now))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        each = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ValueError(
            f"{folder} holds a run that was started in another way: {each}. Start it as before to go on, or remove the "
            f"folder to begin anew."
        )


def _open_at(path: Path, size: int):
    """A file to append to, cut to what is known to be written."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _write_npy(folder: Path, whole: Path, rows: int, dimension: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    with whole.open("wb") as file, (folder / "vectors").open("rb") as vectors:
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(vectors, file, 2**20)


def _write_parquet(folder: Path, whole: Path, rows: int, dimension: int) -> None:
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
