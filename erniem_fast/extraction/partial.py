"""A file of JSON lines that is written in groups, goes on where it was stopped, and appears when it is complete."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


class PartialFile:
    """Lines are written to `PATH.partial`, beside `PATH.partial.json`, which says what they were made from.

    Args:
        path: the file that `finish` makes.
        description: what decides the lines; JSON.
        group: lines are kept in whole groups of this many.

    Attributes:
        lines: the number of lines that are there.

    Raises:
        ValueError: there is a partial file that was made from something else.
    """

    def __init__(self, path: Path, description: dict, group: int) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.note = path.with_name(path.name + ".partial.json")
        text = json.dumps(description, ensure_ascii=True, sort_keys=True)
        if self.note.exists() and self.note.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{self.partial} was begun with another input, schema, model or option; delete it and "
                f"{self.note.name}, or start the command as it was."
            )
        if not self.note.exists():
            self.partial.unlink(missing_ok=True)
            self.note.write_text(text, encoding="utf-8")
        self.file = self.partial.open("ab+")
        self._keep_whole_groups(group)

    def _keep_whole_groups(self, group: int) -> None:
        self.file.seek(0)
        self.lines = kept = size = length = 0
        for line in self.file:
            length += len(line)
            if line.endswith(b"\n"):
                self.lines += 1
                if self.lines % group == 0:
                    kept, size = self.lines, length
        self.lines = kept
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def append(self, items: Iterable[dict]) -> None:
        """Writes a group of lines, to the disk."""
        # Lone surrogates, which UTF-8 cannot hold, stay as they came: escaped.
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        lines = [line if _is_utf8(line) else json.dumps(json.loads(line)) for line in lines]
        self.file.write("".join(line + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines += len(lines)

    def finish(self) -> None:
        """Gives the file its name."""
        self.file.close()
        os.replace(self.partial, self.path)
        self.note.unlink()


def _is_utf8(line: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in line)
