"""Runs the Python blocks of documents as if they were pasted into a REPL, each document in a new one.

`python -m tests.pasted README.md docs/flags.md` prints what they print, and ends with the first error.
"""

import code
import pathlib
import re
import sys

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def fenced(language: str, text: str) -> list[str]:
    """The blocks of code in a language."""
    return [block for each, block in BLOCK.findall(text) if each == language]


class Repl(code.InteractiveConsole):
    """One whose errors are raised, not shown."""

    def showtraceback(self) -> None:
        raise  # the console calls this while it handles the exception

    def showsyntaxerror(self, filename: str | None = None, **options) -> None:
        raise

    def paste(self, block: str) -> None:
        for line in [*block.splitlines(), ""]:
            is_unfinished = self.push(line)
        if is_unfinished:
            raise SyntaxError(f"the block does not end: {block}")


def main() -> None:
    for name in sys.argv[1:]:
        print(f"=== {name}")
        repl = Repl({"__name__": "__main__"})
        for block in fenced("python", pathlib.Path(name).read_text(encoding="utf-8")):
            repl.paste(block)


if __name__ == "__main__":
    main()
