"""Everything that a GPU is needed for, one step after another: verification, tests, benchmarks.

A step that fails does not keep the next ones from running; a step whose packages are missing is left out, and the
remedy is told. The exit code is 1 if anything failed or was left out.
"""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from bench import ROOT
from bench.parser import make_parser

BUDGET = 465  # seconds of all steps: 8 minutes, less the time to make the environment
RESERVED = 90  # of them, for the last step


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
    limit: float = 240


def steps(results: pathlib.Path | None) -> list[Step]:
    """The steps, whose figures go into the folder `results`, or beside all others' where it is None."""
    output = [] if results is None else ["--output", str(results)]
    bench = ("tqdm", "psutil")
    device = ["--device", "cuda", "--dtype", "bfloat16"]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    return [
        Step("what runs each op", ["-m", "erniem_fast", "status"]),
        Step("building the native libraries", ["-m", "erniem_fast", "build"]),
        Step("compiling the kernels", ["-m", "bench.gpu.compile_ahead", "cuda"], ("psutil",), limit=90),
        Step("verification", ["-m", "erniem_fast", "verify"]),
        Step("tests on the GPU", tests, ("pytest",)),
        Step("bench of the kernels", ["-m", "bench", "kernels", *device, "--budget", "80", *output], bench),
        Step("bench of the model", ["-m", "bench", "throughput", *device, *output], (*bench, "matplotlib")),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--results", type=pathlib.Path, metavar="DIR", help="default: bench/results/MACHINE")
    results = parser.parse_args(argv).results
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch finds no CUDA device, so there is nothing to run; `make test` needs none.")
    return run_all(steps(results))


def run_all(steps: list[Step]) -> int:
    """Runs steps; returns the exit code, after a summary."""
    end = time.monotonic() + BUDGET
    verdicts = []
    for step in steps:
        print(f"\n=== {step.name}", flush=True)
        start = time.monotonic()
        limit = min(step.limit, end - start - (0 if step is steps[-1] else RESERVED))
        verdict = run(step, limit)
        print(f"--- {step.name}: {verdict}, {time.monotonic() - start:.0f} s", flush=True)
        verdicts.append(verdict)
    print("\n" + "\n".join(f"{verdict:8} {step.name}" for step, verdict in zip(steps, verdicts, strict=True)))
    return int(any(verdict != "passed" for verdict in verdicts))


def run(step: Step, limit: float) -> str:
    """Runs a step for so many seconds at most; returns what became of it in words."""
    missing = [module for module in step.needs if importlib.util.find_spec(module) is None]
    if missing:
        return f"left out, for want of {', '.join(missing)} (`pip install {' '.join(missing)}`)"
    if limit <= 0:
        return "left out, for want of time"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *step.command], cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        end_group(process)
    return "passed" if code == 0 else f"failed with exit code {code}"


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a step, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
