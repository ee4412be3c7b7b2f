"""Records from text files, one line each; reading goes on at the very line where it stopped."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from .samples import Pair, Sentence


class _Lines:
    """The lines of files, one file after another, without their ends and without empty ones.

    An iteration starts where `load_state_dict` says, and otherwise at the beginning.
    """

    has_header = False

    def __init__(self, *paths: str | PathLike[str]) -> None:
        """
        Args:
            paths: the files, UTF-8.

        Raises:
            FileNotFoundError: one of them does not exist.
            ValueError: there are none.
        """
        if not paths:
            raise ValueError("There are no paths; name a file at least.")
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not a file; pass the paths of text files.")
        self._start = self._place = (0, 0)

    def state_dict(self) -> dict[str, int]:
        """The place behind the last line: the file, and the offset in it, in bytes."""
        return dict(zip(("file", "offset"), self._place, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration start where `state` was taken.

        The state is a place alone: files that were edited, and are as long or longer, are not noticed.

        Raises:
            ValueError: the files have no such place, so they are not those of before.
        """
        index, offset = state["file"], state["offset"]
        if index >= len(self.paths) or offset > self.paths[index].stat().st_size:
            raise ValueError(
                f"The state is at byte {offset} of file {index}, which {', '.join(map(str, self.paths))} do not have; "
                f"go on with the files of before."
            )
        self._start = self._place = (state["file"], state["offset"])

    def _read(self) -> Iterator[tuple[Path, str]]:
        """The lines with the files that they are from."""
        (first, offset), self._place, self._start = self._start, self._start, (0, 0)
        return self._read_from(first, offset)

    def _read_from(self, first: int, offset: int) -> Iterator[tuple[Path, str]]:
        for index, path in enumerate(self.paths[first:], start=first):
            with path.open("rb") as file:
                if self.has_header and not offset:
                    offset = len(file.readline())
                file.seek(offset)
                while line := file.readline():
                    offset += len(line)
                    text = self._decode(line, path, offset).strip("\r\n")
                    if text.strip():
                        self._place = (index, offset)
                        yield path, text
            offset = 0

    def _decode(self, line: bytes, path: Path, end: int) -> str:
        try:
            return line.decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 in the line that ends at byte {end} ({error}); convert the file."
            ) from None


class TextFiles(_Lines):
    """A `Sentence` of each line that is not empty."""

    def __init__(self, *paths: str | PathLike[str], language: str | None = None) -> None:
        """
        Args:
            paths: text files, UTF-8.
            language: the name of the language of all lines.
        """
        super().__init__(*paths)
        self.language = language

    def __iter__(self) -> Iterator[Sentence]:
        return (Sentence(line.strip(), self.language) for _, line in self._read())


class TsvFiles(_Lines):
    """A `Pair` of each line of tab-separated files whose first line names the columns; nothing is quoted in them."""

    has_header = True

    def __init__(
        self,
        *paths: str | PathLike[str],
        source: str = "source",
        target: str = "target",
        source_language: str | None = None,
        target_language: str | None = None,
    ) -> None:
        """
        Args:
            paths: the files, UTF-8.
            source, target: the columns of the texts and of their translations.
            source_language, target_language: the column with the name of the language; if there is no such column, the
                name of the language of all lines.

        Raises:
            ValueError: a file lacks one of the columns.
        """
        super().__init__(*paths)
        self._columns = {
            path: self._find(path, source, target, source_language, target_language) for path in self.paths
        }

    def _find(self, path: Path, *names: str | None) -> list[int | str | None]:
        """Of each of a pair's fields the column, or what it is in every line."""
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline().rstrip("\r\n").split("\t")
        for name in names[:2]:
            if name not in header:
                raise ValueError(f"{path} has the columns {', '.join(header)}, and none called {name!r}; name another.")
        return [header.index(name) if name in header else name for name in names]

    def __iter__(self) -> Iterator[Pair]:
        return self._split(self._read())

    def _split(self, lines: Iterator[tuple[Path, str]]) -> Iterator[Pair]:
        for path, line in lines:
            fields, columns = line.split("\t"), self._columns[path]
            if len(fields) <= max(each for each in columns if isinstance(each, int)):
                raise ValueError(f"{path} has {len(fields)} columns in the line {line[:80]!r}; its header names more.")
            yield Pair(*(fields[each] if isinstance(each, int) else each for each in columns))
