"""Time a newcomer from `git clone` to the first embedding, and with --bench to the picture of `make bench`.

Everything is new, in a temporary folder: the clone (of what is committed here), the environments, the home with its
caches. The commands are the README's own, as pasted: the first block of shell commands under "Install", and the blocks
of "Quick start" up to the first that makes embeddings. pip downloads from wherever it is set to, without its cache, and
says how much where it is not quiet; `make` tells it to be. Run this alone on the machine.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

from bench import INTERRUPTED, RESULTS, ROOT
from bench.machine import Machine, describe
from bench.parser import make_parser
from bench.record import keep, now
from bench.report.parts import table

NAMED = ("erniem-fast", "torch", "transformers", "triton")  # packages whose versions are kept, where they are installed
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a newcomer.

    Attributes:
        command: as typed, or what it is.
        seconds: it took.
        downloaded: bytes, as far as pip told; None if it told nothing.
    """

    command: str
    seconds: float
    downloaded: int | None


@dataclasses.dataclass(frozen=True)
class Way:
    """What a newcomer wants, and the steps to it.

    Attributes:
        goal: what there is at the end.
        steps: one after another.
        disk: bytes of all that they left.
    """

    goal: str
    steps: list[Step]
    disk: int


@dataclasses.dataclass
class NewcomerRun:
    """All ways, on one machine.

    Attributes:
        commit: that was cloned.
        python: its version.
        versions: of packages that the README's commands installed.
        ways: the one to the first embedding, and where it was asked for the one to the picture.
    """

    date: str
    machine: Machine
    commit: str
    python: str
    versions: dict[str, str]
    ways: list[Way]


def main(argv: list[str] | None = None) -> int:
    """Time the ways; returns the exit code: 0, 1 if a command failed, or 130 after Ctrl-C."""
    parser = make_parser("newcomer", __doc__)
    parser.add_argument("--bench", action="store_true", help="time `make bench` too, which takes many minutes")
    parser.add_argument("--before", metavar="COMMAND", help="run before the README's, such as one that installs torch")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="of both ways (default: this one)")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help="default: bench/results/MACHINE")
    arguments = parser.parse_args(argv)
    try:
        run = measure(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except subprocess.CalledProcessError as error:
        print(f"python -m bench newcomer: `{error.cmd}` failed:\n{error.output}", file=sys.stderr)
        return 1
    stem = (arguments.output or RESULTS / run.machine.slug) / "newcomer"
    keep(run, markdown(run), stem)
    print(f"\n{markdown(run)}\n{stem}.json and {stem}.md hold this")
    return 0


def measure(arguments: argparse.Namespace) -> NewcomerRun:
    """Goes the ways.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    python = shlex.quote(arguments.python)
    with tempfile.TemporaryDirectory() as folder:
        newcomer = Newcomer(pathlib.Path(folder))
        ways = [newcomer.go("the first embedding", embedding_commands(python, arguments.before))]
        about = [
            newcomer.read(line)
            for line in ("git rev-parse --short HEAD", "python --version", "pip list --format freeze")
        ]
    if arguments.bench:
        with tempfile.TemporaryDirectory() as folder:
            newcomer = Newcomer(pathlib.Path(folder))
            ways.append(newcomer.go("the picture of `make bench`", [CLONE, f"make bench PYTHON={python}"]))
            if not [*newcomer.clone.glob("bench/results/*/throughput-*.png")]:
                raise subprocess.CalledProcessError(1, "make bench", "it left no picture")
    commit, version, packages = about
    versions = dict(line.split("==") for line in packages.splitlines() if line.partition("==")[0] in NAMED)
    return NewcomerRun(now(), describe("cpu"), commit, version.removeprefix("Python "), versions, ways)


CLONE = f"git clone --quiet {shlex.quote(str(ROOT))} ."


def embedding_commands(python: str, before: str | None = None) -> list[str]:
    """Those to the first embedding, as shell commands."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    own = [before] if before else []
    script = "\n".join(first_embedding(readme))
    return [CLONE, f"{python} -m venv ../venv", *own, *install_lines(readme), f"python -c {shlex.quote(script)}"]


def section(readme: str, heading: str) -> str:
    """The text under a heading of the README."""
    return readme.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def install_lines(readme: str) -> list[str]:
    """The commands of the first shell block under "Install"."""
    lines = (line.partition("#")[0].strip() for line in blocks(section(readme, "Install"), "sh")[0].splitlines())
    return [line for line in lines if line]


def first_embedding(readme: str) -> list[str]:
    """The blocks of the quick start up to the first that makes embeddings."""
    code = blocks(section(readme, "Quick start"), "python")
    (last, *_) = (index for index, block in enumerate(code) if re.search(r"\bembed(dings)? = |\.embed\(", block))
    return code[: last + 1]


class Newcomer:
    """Somebody with an empty home, who types commands in a clone.

    Args:
        folder: empty; takes home, clone and environment.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.clone, home = folder, folder / "clone", folder / "home"
        for each in (self.clone, home):
            each.mkdir()
        ours = ("PYTHON", "VIRTUAL_ENV", "ERNIEM_FAST_", "XDG_", "HF_", "TRITON_", "OMP_", "MAKE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment = {
            **kept,
            "HOME": str(home),
            "PATH": f"{folder}/venv/bin:{kept['PATH']}",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_PROGRESS_BAR": "off",
        }

    def go(self, goal: str, commands: list[str]) -> Way:
        """Runs the commands, one after another.

        Raises:
            subprocess.CalledProcessError: one failed.
        """
        steps = []
        for command in commands:
            shown = "the quick start to its first embedding" if command.startswith("python -c ") else command
            print(shown, file=sys.stderr)
            start = time.perf_counter()
            printed = self.read(command, stderr=subprocess.STDOUT)
            steps.append(
                Step(shown.replace(str(ROOT), "erniem_fast"), time.perf_counter() - start, downloaded(printed))
            )
        return Way(goal, steps, size_of(self.folder))

    def read(self, command: str, **options: object) -> str:
        """What a command prints."""
        where = {"cwd": self.clone, "env": self.environment}
        return subprocess.run(
            command, shell=True, check=True, stdout=subprocess.PIPE, text=True, **where, **options
        ).stdout.strip()


def downloaded(printed: str) -> int | None:
    """The bytes that pip says it downloaded; None if it says nothing."""
    sizes = re.findall(r"^ *Downloading \S+ \(([\d.]+) (bytes|kB|MB|GB)\)", printed, flags=re.MULTILINE)
    return round(sum(float(number) * UNITS[unit] for number, unit in sizes)) if sizes else None


def size_of(folder: pathlib.Path) -> int:
    """The bytes of all files in a folder, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def markdown(run: NewcomerRun) -> str:
    """A table for each way."""
    packages = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    heading = f"### A newcomer's first hour: {run.machine.cpu}, {run.machine.cores} cores"
    about = f"Commit {run.commit}, Python {run.python}, {packages}. {run.date[:10]}."
    return "\n\n".join([heading, about, *map(_way, run.ways)]) + "\n"


def _way(way: Way) -> str:
    total = sum(step.seconds for step in way.steps)
    told = [step.downloaded for step in way.steps if step.downloaded is not None]
    rows = [[f"`{step.command}`", f"{step.seconds:.1f}", _megabytes(step.downloaded)] for step in way.steps]
    rows.append(["in all", f"{total:.1f}", _megabytes(sum(told) if told else None)])
    heading = f"**From `git clone` to {way.goal}**: {total / 60:.1f} minutes; {way.disk / 1e6:,.0f} MB on the disk"
    return f"{heading}\n\n{table(['', 'seconds', 'MB downloaded, as pip tells'], rows)}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f}"
