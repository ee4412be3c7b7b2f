"""Times ways to launch each Triton kernel on this GPU, in bfloat16 at the base model's size: tiles, warps, stages.

The one that is shipped is always among them. Results are compared with its results before a time counts. Launches take
turns, and the ratios to the shipped one's time are taken round by round. Other processes compile ahead. The most
important come first, and figures are written after each, so that an end loses nothing. A floor stands beside every
time; see `python -m bench kernels`.
"""

import argparse
import contextlib
import multiprocessing
import pathlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from time import monotonic as seconds_now
from typing import NamedTuple

import torch
from torch import Tensor

from bench import INTERRUPTED, RESULTS
from bench.difference import LARGEST_ERROR, row_error
from bench.kernels.assembly import of_kernel
from bench.kernels.candidates import SIZE, Call, Launch, Problem, describe_launch, launches, make_call, problems
from bench.kernels.compiling import compiled
from bench.kernels.figures import LaunchFigures, ProblemFigures, SweepRun
from bench.kernels.jobs import Values, least_work, make_batch
from bench.machine import available_cores, describe
from bench.parser import make_parser
from bench.record import keep, now
from bench.report.sweep import markdown, summary
from bench.roofline import measure_rates
from bench.timing import quartiles, take_turns
from erniem_fast.kernels import device as kernels_device

DTYPE = torch.bfloat16
WARM_UP = 2
NOT_COMPILED = "not compiled in time"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("sweep", __doc__)
    swept = list(dict.fromkeys(problem.op for problem in problems()))
    parser.add_argument("--ops", nargs="+", choices=swept, default=swept, help="default: all")
    parser.add_argument("--tokens", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each launch (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="end after these (default: 300)")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help="default: bench/results/MACHINE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; returns the exit code: 0, or 130 after Ctrl-C."""
    end = seconds_now()
    arguments = parse_arguments(argv)
    end += arguments.budget
    if not torch.cuda.is_available():
        sys.exit("python -m bench sweep: torch finds no CUDA device, and without one there is nothing to time.")
    device = torch.device("cuda")
    wanted = [problem for problem in problems() if problem.op in arguments.ops]
    run = SweepRun(
        date=now(),
        machine=describe(device),
        torch=torch.__version__,
        rounds=arguments.rounds,
        tokens=arguments.tokens,
        rates=measure_rates(device, DTYPE),
        problems=[],
        left_out=[],
        interrupted=False,
    )
    stem = (arguments.output or RESULTS / run.machine.slug) / "sweep-bfloat16"
    try:
        run_problems(wanted, run, device, end, stem)
    except KeyboardInterrupt:
        run.interrupted = True
    keep(run, markdown(run), stem)
    print(f"\n{summary(run)}\n{stem}.* hold this, all launches and every round")
    return INTERRUPTED if run.interrupted else 0


def run_problems(
    wanted: Sequence[Problem], run: SweepRun, device: torch.device, end: float, stem: pathlib.Path
) -> None:
    """Measure problem after problem into `run`, and keep it after each, until the moment `end`."""
    with compiling(wanted, run.tokens, device) as compilations:
        for problem in wanted:
            left = end - seconds_now()
            if left <= 0:
                run.left_out.append(problem.name)
                continue
            wait(compilations[problem], timeout=left)
            run.problems.append(measure(problem, run, device, compilations[problem]))
            keep(run, markdown(run), stem)
            print(f"{problem.name}: {len(run.problems[-1].launches)} launches", flush=True)


@contextlib.contextmanager
def compiling(
    wanted: Sequence[Problem], tokens: int, device: torch.device
) -> Iterator[dict[Problem, list[Future["Compiled"]]]]:
    """Compiles the launches of all problems in other processes, in order; lends what comes of each.

    The processes use no GPU: they compile for its architecture what tensors on the CPU of the same shapes are launched
    with, and leave it in Triton's cache.
    """
    described = kernels_device.describe(device)
    pool = ProcessPoolExecutor(available_cores(), multiprocessing.get_context("spawn"))
    try:
        yield {
            problem: [
                pool.submit(compile_launch, described.arch, problem, tokens, launch)
                for launch in launches(problem, make_batch(problem.lengths, tokens, device), described, DTYPE)
            ]
            for problem in wanted
        }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Compiled(NamedTuple):
    """What comes of a compilation: why it failed, or what the kernels take; they are in Triton's cache then."""

    failure: str | None
    takes: str = ""


def compile_launch(arch: str, problem: Problem, tokens: int, launch: Launch) -> Compiled:
    """Compiles a launch for an architecture; replaces Triton's driver in this process."""
    batch, calls = make_batch(problem.lengths, tokens, torch.device("cpu")), []
    try:
        compiled(arch, lambda: calls.append(make_call(problem, batch, lambda *shape: torch.empty(shape, dtype=DTYPE))))
        launches = compiled(arch, partial(calls[0], **launch))
        return Compiled(None, "; ".join(takes(arch, each.kernel) for each in launches))
    except Exception as error:  # whatever Triton's compiler may raise
        return Compiled(f"does not compile: {first_line(error)}")


def takes(arch: str, kernel) -> str:
    """The registers of a thread, the bytes of them that go to memory, and a program's shared memory."""
    figures = of_kernel(arch, kernel)
    spills = f", {figures['spills']} B spilled" if figures["spills"] else ""
    return f"{figures['registers']} registers{spills}, {kernel.metadata.shared / 1024:.0f} KiB"


def measure(
    problem: Problem, run: SweepRun, device: torch.device, compilations: Sequence[Future[Compiled]]
) -> ProblemFigures:
    """The figures of a problem: of each launch whose result is that of the shipped one."""
    torch.manual_seed(0)
    batch = make_batch(problem.lengths, run.tokens, device)
    call = make_call(problem, batch, Values(device, DTYPE, DTYPE))
    candidates = launches(problem, batch, kernels_device.describe(device), DTYPE)
    outcomes = [outcome_of(future) for future in compilations]
    checked = check(call, candidates, [outcome.failure for outcome in outcomes])
    right = [launch for launch, (_, failure) in zip(candidates, checked, strict=True) if failure is None]
    turns = take_turns([lambda launch=launch: call(**launch) for launch in right], run.rounds, device, warm_up=WARM_UP)
    seconds = [[taken.seconds for taken in each] for each in turns]
    rounds = iter(seconds)
    shipped = seconds[0] if seconds else None
    figures = [
        launch_figures(launch, outcome.takes, next(rounds) if failure is None else [], shipped, difference, failure)
        for launch, outcome, (difference, failure) in zip(candidates, outcomes, checked, strict=True)
    ]
    work = least_work(problem.op, SIZE, batch, DTYPE)[problem.step]
    return ProblemFigures(*problem, batch.tokens, **work._asdict(), floor=work.floor(run.rates), launches=figures)


def outcome_of(future: Future[Compiled]) -> Compiled:
    """What has come of a compilation so far; if its process was killed, the launch will compile here."""
    if not future.done():
        return Compiled(NOT_COMPILED)
    return Compiled(None) if future.exception() else future.result()


def check(
    call: Call, candidates: Sequence[Launch], failures: Sequence[str | None]
) -> list[tuple[float | None, str | None]]:
    """For each launch, how far its results are from those of the first, which is shipped, and why it is not timed.

    Args:
        call: runs a launch.
        candidates: the launches.
        failures: what has gone wrong with each of them so far; None if nothing has.
    """
    expected, checked = None, []
    for launch, failure in zip(candidates, failures, strict=True):
        difference = None
        if failure is None and expected is None and launch is not candidates[0]:
            failure = "not compared, because the shipped one is missing"
        if failure is None:
            try:
                results = poisoned(call, launch)
                expected = results if expected is None else expected
                difference = max(row_error(*pair) for pair in zip(results, expected, strict=True))
                failure = None if difference <= LARGEST_ERROR["bfloat16"] else f"differs by {difference:.2g}"
            except Exception as error:  # a launch asks for more than the GPU has
                failure = f"fails: {first_line(error)}"
        checked.append((difference, failure))
    return checked


def poisoned(call: Call, launch: Launch) -> tuple[Tensor, ...]:
    """The results of a launch, with NaN where its kernels write nothing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call(**launch)
    finally:
        torch.use_deterministic_algorithms(False)


def launch_figures(
    launch: Launch,
    takes: str,
    seconds: list[float],
    shipped: list[float] | None,
    difference: float | None,
    problem: str | None,
) -> LaunchFigures:
    gains = [base / own for base, own in zip(shipped, seconds, strict=True)] if shipped and seconds else None
    return LaunchFigures(
        launch=describe_launch(launch),
        takes=takes,
        seconds=quartiles(seconds) if seconds else None,
        gain=quartiles(gains) if gains else None,
        difference=difference,
        problem=problem,
        rounds=seconds,
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
