"""`python -m erniem_fast`: the commands."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import flags
from .conversion import command as conversion
from .embedding import command as embedding
from .extraction import command as extraction
from .matmul import fastest
from .native.build import build
from .native.compiler import BuildError
from .status import status
from .verification import command as verification


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m erniem_fast")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.does, description=command.does))
    arguments = parser.parse_args()
    try:
        flags.check()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return _COMMANDS[arguments.command].run(arguments)


def _status(_: argparse.Namespace) -> int:
    print(status())
    return 0


def _build(_: argparse.Namespace) -> int:
    tell = partial(print, flush=True)
    try:
        for device, path in build(report=tell).items():
            tell(f"{device}: {path}")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    fastest.measure_all(tell)
    tell("products: timed; `python -m erniem_fast status` shows the fastest")
    return 0


class _Command(NamedTuple):
    """A command: what it does, what runs it and returns the exit status, and what adds its arguments to a parser."""

    does: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


_COMMANDS = {
    "status": _Command("show versions, flags, and which implementation runs each op here, and why", _status),
    "build": _Command("compile the native libraries for this machine, and time the libraries for products", _build),
    "verify": _Command(
        "compare every kernel that runs here with the reference, or a model with the stock one",
        verification.run,
        verification.add_arguments,
    ),
    "convert": _Command(
        "write a checkpoint of PaddleNLP, Baidu, XLM-RoBERTa or ERNIE-M as another",
        conversion.run,
        conversion.add_arguments,
    ),
    "embed": _Command("turn a file of texts into a file of vectors", embedding.run, embedding.add_arguments),
    "extract": _Command("find what a schema names in a file of texts", extraction.run, extraction.add_arguments),
}


if __name__ == "__main__":
    sys.exit(main())
