"""The command lines."""

import argparse


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m bench COMMAND`."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
