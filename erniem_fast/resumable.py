"""An output file that collects work, survives a stop at any point, and appears when it is whole."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

import erniem_fast

SUFFIX = ".partial"
PIECE, PIECES = 2**18, 256  # bytes of a piece, and pieces of a model's file that are digested; smaller files whole


class ResumableOutput:
    """The rows of one run, in a folder beside the output until they are all there.

    Each `append` is on disk before it returns. A run that was stopped between two of them goes on after the last.

    Attributes:
        folder: holds the parts, which are files; with a lock, and with the description and the sizes of the parts.
        rows: the number of rows that are on disk.
    """

    def __init__(self, output: Path, description: Mapping[str, object], parts: Sequence[str]) -> None:
        """Starts a run, or goes on with one that was stopped.

        Args:
            output: the file to write.
            description: what decides the output, in values of JSON; see `describe`.
            parts: names of the files that `append` adds to.

        Raises:
            ValueError: the output is there already, its folder is missing, another process works on it, or the run that
                was stopped had another description or has lost a part or its state.
        """
        _check(output)
        self._output, self.folder = output, partial_folder(output)
        self.folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, _lock(self.folder))
            begin = {"description": dict(description), "rows": 0, "sizes": dict.fromkeys(parts, 0)}
            self._state = _read_state(self.folder) or begin
            _compare(self.folder, self._state["description"], description)
            self._parts = {
                name: opened.enter_context(_open_at(self.folder / name, size))
                for name, size in self._state["sizes"].items()
            }
            self._write_state()
            self._open = opened.pop_all()

    def __enter__(self) -> "ResumableOutput":
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files, which stay as they are."""
        self._open.close()

    @property
    def rows(self) -> int:
        return self._state["rows"]

    def append(self, rows: int, **parts: bytes) -> None:
        """Adds rows, as the bytes that each part has of them."""
        for name, data in parts.items():
            file = self._parts[name]
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._state["sizes"][name] = file.tell()
        self._state["rows"] += rows
        self._write_state()

    def finish(self, write: Callable[[Path], object]) -> None:
        """Makes the output, which appears at once and whole, and removes all else.

        `write` is called with the path of a file in `folder`, of the output's suffix, and writes it from the parts.
        """
        whole = self.folder / f"whole{self._output.suffix}"
        write(whole)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self._output)
        shutil.rmtree(self.folder)

    def _write_state(self) -> None:
        new = self.folder / "state.json.new"
        with new.open("w") as file:
            json.dump(self._state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / "state.json")


def run(work: Callable[[], str], output: Path) -> int:
    """Does the work of a command that writes a ResumableOutput.

    Prints what `work` returns; or, to the standard error, what is wrong, or how to go on after a stop.

    Returns:
        The exit code.
    """
    try:
        print(work())
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        if isinstance(error, OSError) and partial_folder(output).is_dir():  # a full disk, for example
            print(f"Start the same command again to go on from {partial_folder(output)}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped; start the same command again to go on from {partial_folder(output)}.", file=sys.stderr)
        return 130
    return 0


def partial_folder(output: Path) -> Path:
    """Where a run keeps what it has so far."""
    return output.with_name(output.name + SUFFIX)


def describe(options: Mapping[str, object], *, model: Path, input: Path) -> dict[str, object]:
    """What decides the bytes of an output, on one machine.

    Args:
        options: of the command, in values of JSON, without names of files.
        model: the folder of the model and its tokenizer.
        input: the file of texts.
    """
    versions = {
        "erniem_fast": erniem_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**options, "model": digest_of_folder(model), "input": digest(input), "versions": versions}


def check_input(path: Path) -> None:
    """Refuses an input that is not there, before a model is loaded."""
    if not path.is_file():
        raise ValueError(f"--input {path}: there is no such file; name a file of texts.")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """SHA-256 of the files' names, sizes and contents; of large files, only pieces, from beginning to end.

    Pieces are enough to tell models apart, and are read in a fraction of a second. Folders of runs that were stopped
    are left out, because the output may be written into the folder.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.endswith(SUFFIX) for part in name.parts):
            size = path.stat().st_size
            digest.update(f"{name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(PIECE, size // PIECES)):
                    file.seek(start)
                    digest.update(file.read(PIECE))
                digest.update(file.read())  # to the end
    return digest.hexdigest()


def _check(output: Path) -> None:
    if output.exists():
        raise ValueError(f"--output {output} is there already; remove it, or name another file.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first.")


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


def _compare(folder: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    # As JSON, because the order of keys may decide the output too.
    changed = [name for name in {**before, **now} if json.dumps(before.get(name)) != json.dumps(now.get(name))]
    if changed:
        each = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ValueError(
            f"{folder} holds a run that was started in another way: {each}. Start it as before to go on, or remove the "
            f"folder to begin anew."
        )


def _open_at(path: Path, size: int):
    """A file to append to, cut to what is known to be written."""
    path.touch()
    if path.stat().st_size < size:
        raise ValueError(f"{path} has lost some of its {size} bytes; remove {path.parent} to begin anew.")
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
