"""What a GPU is needed for, in parts of at most 6 minutes, in the order in which a short loan should go.

    correctness   4 to 5 minutes: builds, checks of `verify`, tests marked `gpu`
    kernels       6: each op beside PyTorch's, those that were changed last first
    model         6: inference, then training
    sweep         6: ways to launch the kernels

The first two fit 15 minutes together with the start of a machine. A step that fails does not keep the next ones from
running; a step whose packages are missing is left out, and the remedy is told. The exit code is 1 if anything failed
or was left out. A report is written after each step, and figures as they come, so that a machine that is lent for a
short time can be given back between parts. bench/gpu/predictions.md says what the figures should be.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton

from bench import RESULTS, ROOT
from bench.machine import describe
from bench.parser import make_parser
from bench.record import now

BUDGET = 320  # seconds of a part: 6 minutes, less the time to make the environment and GRACE
GRACE = 20  # seconds in which a benchmark that is interrupted writes down what it has measured
BENCH = ("tqdm", "psutil")


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: what it is.
        command: its arguments for Python.
        needs: modules that it imports and that may be missing.
        limit: seconds until it is ended.
    """

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()
    limit: float = BUDGET


@dataclass(frozen=True)
class Outcome:
    """What became of a step, in words; the seconds that it took; the last line that it printed."""

    name: str
    verdict: str
    seconds: float
    last_line: str


def parts(results: pathlib.Path) -> dict[str, list[Step]]:
    """The steps of each part; their figures go into the folder `results`."""
    device, output = ["--device", "cuda", "--dtype", "bfloat16"], ["--output", str(results)]
    model, plotted = ["-m", "bench", "throughput", *device, "--against", "all"], (*BENCH, "matplotlib")
    kernels = ["-m", "bench", "kernels", *device, "--ops", "embeddings", "add_norm", "attention", "bias_gelu"]
    lengths = ["--lengths", "text", "modernbert"]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    return {
        "correctness": [
            Step("what runs each op", ["-m", "erniem_fast", "status"]),
            Step("building the native libraries", ["-m", "erniem_fast", "build"]),
            Step("verification", ["-m", "bench.gpu.verify_in_parallel", "cuda"], ("psutil",), limit=160),
            Step("tests on the GPU", tests, ("pytest",)),
        ],
        "kernels": [Step("bench of the kernels", [*kernels, "--budget", "280", *output], BENCH)],
        "model": [
            Step("bench of the model", [*model, "--batch-size", "256", "1", *lengths, *output], plotted, limit=170),
            Step("bench of training", [*model, "--train", "--batch-size", "64", *lengths, *output], plotted),
        ],
        "sweep": [Step("sweep of launches", ["-m", "bench", "sweep", "--budget", "280", *output], ("psutil",))],
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch finds no CUDA device, so there is nothing to run; `make test` needs none.")
    results = arguments.results or RESULTS / describe("cuda").slug
    passed = [run_part(part, parts(results)[part], results) for part in arguments.part or parts(results)]
    return int(not all(passed))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", __doc__)
    names = parts(RESULTS)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--results", type=pathlib.Path, metavar="DIR", help="default: bench/results/MACHINE")
    arguments = parser.parse_args(argv)
    for part in arguments.part:
        if part not in names:
            parser.error(f"argument PART: there is no part {part!r}; choose from {', '.join(names)}")
    return arguments


def run_part(part: str, steps: Sequence[Step], results: pathlib.Path) -> bool:
    """Runs a part's steps and writes what became of them to `results`; returns whether all passed."""
    end = time.monotonic() + BUDGET
    outcomes = []
    for step in steps:
        outcomes.append(run(step, min(step.limit, end - time.monotonic())))
        report = markdown(part, outcomes)
        results.mkdir(parents=True, exist_ok=True)
        (results / f"gpu-{part}.md").write_text(report, encoding="utf-8")
    print(f"\n{report}", flush=True)
    return all(outcome.verdict == "passed" for outcome in outcomes)


def markdown(part: str, outcomes: Sequence[Outcome]) -> str:
    machine = describe("cuda" if torch.cuda.is_available() else "cpu")
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}"
    rows = [f"| {each.name} | {each.verdict} | {each.seconds:.0f} | {each.last_line} |" for each in outcomes]
    return "\n".join(
        [
            f"# make gpu PART={part}",
            "",
            f"{machine.gpu or machine.cpu}, {versions}, {now()}.",
            "",
            "| step | verdict | seconds | last line |",
            "|---|---|---:|---|",
            *rows,
            "",
        ]
    )


def run(step: Step, limit: float) -> Outcome:
    """Runs a step for so many seconds at most."""
    print(f"\n=== {step.name}", flush=True)
    missing = [module for module in step.needs if importlib.util.find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        verdict = f"left out, for want of {', '.join(missing)} (`pip install {names}`)"
        outcome = Outcome(step.name, verdict, 0.0, "")
    elif limit <= 0:
        outcome = Outcome(step.name, "left out, for want of time", 0.0, "")
    else:
        outcome = run_process(step, limit)
    print(f"--- {step.name}: {outcome.verdict}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def run_process(step: Step, limit: float) -> Outcome:
    """Runs a step's command, whose output goes to this process's, and ends what it leaves behind."""
    begun = time.monotonic()
    process = start(step.command)
    lines = [""]
    reader = threading.Thread(target=echo, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        verdict = "passed" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        verdict = f"ended after {limit:.0f} s"
        interrupt(process)
    finally:
        end_group(process)
    reader.join()
    return Outcome(step.name, verdict, time.monotonic() - begun, lines[0])


def start(command: Sequence[str]) -> subprocess.Popen:
    """A process of Python with these arguments; it can be interrupted even if this one runs in the background."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background processes ignore it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def echo(stream, last: list[str]) -> None:
    """Prints a stream's lines as they come, and keeps the last one that is not blank in `last`."""
    for line in stream:
        print(line, end="", flush=True)
        if line.strip():
            last[0] = line.strip()


def interrupt(process: subprocess.Popen) -> None:
    """Asks a step to end, as Ctrl-C does, and waits for it."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a step, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
