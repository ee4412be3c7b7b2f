"""Times each op beside PyTorch's own ways to do the same work, and beside the floor that the device sets.

The floor of a step is the larger of two times: the fewest bytes that it reads and writes, at the rate of a copy, and
the fewest FLOP, at the rate of a matrix product; both rates are measured in the same run. Results are compared with
those in float64 before a time counts. Contenders take turns, round after round; ratios are taken round by round.

On a GPU a time is that of the kernels. What Python takes to launch them is the host's, a figure of its own.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from time import monotonic as seconds_now
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench import INTERRUPTED, RESULTS
from bench.difference import LARGEST_ERROR, row_error
from bench.kernels.figures import KernelRun, KernelSettings, StepFigures
from bench.kernels.jobs import MAKERS, OURS, Contender, Job, P, make_job
from bench.machine import describe
from bench.model.checkpoint import SIZES
from bench.parser import make_parser
from bench.record import now, write
from bench.report.kernels import markdown, plot
from bench.roofline import Rates, measure_rates
from bench.timing import WARM_UP, Taken, quartiles, take_turns
from erniem_fast.native.build import build
from erniem_fast.native.library import BuildError
from erniem_fast.ops.choose import choose

COMPARED = ("in the result", "in a gradient")
LENGTHS = ("32", "64", "128", "256", "512", "ragged")
STEPS = {
    "inference": "forward without dropout, nothing saved",
    "forward": f"forward in training, dropout {P}",
    "backward": f"backward, dropout {P}",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("kernels", __doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--ops", nargs="+", choices=MAKERS, default=list(MAKERS), help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: both")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="of attention (default: all)")
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 1024, help="default here: %(default)s")
    parser.add_argument(
        "--dtype", choices=LARGEST_ERROR, default="bfloat16" if cuda else "float32", help="%(default)s here"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each contender (default: 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long to start")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no job after this")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", help="default: bench/results/MACHINE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 0, 1 where a contender failed or was refused, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        build([arguments.device.type])
    except BuildError as error:
        print(f"the native library is not measured: {error}", file=sys.stderr)
    dtype = getattr(torch, arguments.dtype)
    run = KernelRun(
        date=now(),
        machine=describe(arguments.device),
        settings=KernelSettings(arguments.dtype, arguments.rounds, torch.__version__, STEPS),
        implementations={op: choose(op, arguments.device, dtype) for op in arguments.ops},
        rates=measure_rates(arguments.device, dtype),
        results=[],
        left_out=[],
        interrupted=False,
    )
    try:
        run_jobs(arguments, run)
    except KeyboardInterrupt:
        run.interrupted = True
    if not run.results:
        return INTERRUPTED
    save(run, arguments.output or RESULTS / run.machine.slug)
    return INTERRUPTED if run.interrupted else int(any(result.problem for result in run.results))


def jobs_of(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """`(op, size, lengths)` of every job, one size after the other."""
    for size in arguments.sizes:
        for op in arguments.ops:
            for lengths in arguments.lengths if op == "attention" else ("512",):
                yield op, size, lengths


def run_jobs(arguments: argparse.Namespace, run: KernelRun) -> None:
    """Measure job after job into `run`."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    jobs, start = list(jobs_of(arguments)), seconds_now()
    with tqdm(total=len(jobs) * len(STEPS) * (WARM_UP + arguments.rounds), unit="round", disable=None) as bar:
        for op, size, lengths in jobs:
            if seconds_now() - start > arguments.budget:
                run.left_out.append(f"{op}, {size}, {lengths}")
                continue
            # torch.compile has no sparse gradients, and its dozens of shapes of attention would take minutes.
            compiled = not arguments.no_compile and op != "embeddings" and (op != "attention" or lengths == "512")
            job = make_job(op, size, lengths, arguments.tokens, dtype, device, compiled)
            bar.set_description(job.name)
            run.results += measure(job, LARGEST_ERROR[arguments.dtype], arguments.rounds, run.rates, device, bar)
            del job  # its tensors would still be there beside the next one's


class Checked(NamedTuple):
    """A contender, the error of its results, and why it is refused; None where it is not."""

    contender: Contender
    difference: float | None
    problem: str | None


def measure(job: Job, tolerance: float, rounds: int, rates: Rates, device: torch.device, bar) -> list[StepFigures]:
    """The figures of a job: of each step and contender."""
    checked = list(check(job, tolerance))
    results = []
    for step, work in job.work.items():
        present = [each for each in checked if step in each.contender.steps]
        calls = [call_of(each.contender, step) for each in present if each.problem is None]
        turns = iter(take_turns(calls, rounds, device, bar))
        ours = None
        for each in present:
            taken = next(turns) if each.problem is None else []
            ours = taken if each.contender.name == OURS else ours
            results.append(step_figures(job, step, work.floor(rates), each, taken, ours))
    return results


def step_figures(
    job: Job, step: str, floor: float, checked: Checked, taken: list[Taken], ours: list[Taken] | None
) -> StepFigures:
    """The figures of a contender from what its rounds and ours took."""
    ratios = [theirs.seconds / own.seconds for theirs, own in zip(taken, ours, strict=True)] if taken and ours else []
    seconds, host = [each.seconds for each in taken], [each.host for each in taken if each.host is not None]
    return StepFigures(
        op=job.op,
        size=job.size,
        lengths=job.lengths,
        tokens=job.tokens,
        step=step,
        contender=checked.contender.name,
        **job.work[step]._asdict(),
        floor=floor,
        seconds=quartiles(seconds) if seconds else None,
        speedup=quartiles(ratios) if ratios else None,
        difference=checked.difference,
        problem=checked.problem,
        rounds=seconds,
        host=quartiles(host) if host else None,
    )


def check(job: Job, tolerance: float) -> Iterator[Checked]:
    """Run every contender once and compare it with the computation in float64."""
    exact = outputs(job.exact())
    for contender in job.contenders:
        try:
            results = outputs(contender)
            for step in contender.steps:
                call_of(contender, step)()
        except Exception as error:  # whatever its compiler may raise; the others go on
            problem = f"{job.name}: {contender.name} failed: {str(error).strip().splitlines()[0]}"
            yield Checked(contender, None, problem)
            continue
        errors = [row_error(*pair) for pair in zip(results, exact, strict=True)]
        problem = None
        if not all(error <= tolerance for error in errors):  # NaN is refused too
            of = " and ".join(f"{error:.2g} {name}" for error, name in zip(errors, COMPARED, strict=True))
            problem = f"{job.name}: {contender.name} refused: its error is {of} ({tolerance:.2g} is allowed)"
        yield Checked(contender, max(errors), problem)


def outputs(contender: Contender) -> tuple[Tensor, Tensor]:
    """The real tokens' result and first gradient; without dropout, whose masks differ between contenders."""
    out, leaves = training_forward(contender, 0.0)
    (grad_first,) = torch.autograd.grad(out, leaves[:1], contender.grad)
    if grad_first.is_sparse:
        grad_first = grad_first.coalesce().values()
    elif grad_first.shape[:-1] == out.shape[:-1]:
        grad_first = contender.real(grad_first)
    return contender.real(out.detach()), grad_first


def training_forward(contender: Contender, p: float) -> tuple[Tensor, list[Tensor]]:
    leaves = [leaf.requires_grad_() for leaf in contender.leaves]
    return contender.forward(p), leaves


def call_of(contender: Contender, step: str) -> Callable[[], object]:
    """What is timed: a function without arguments."""
    if step == "inference":
        return torch.no_grad()(lambda: contender.forward(0.0))
    if step == "forward":
        return lambda: training_forward(contender, P)
    out, leaves = training_forward(contender, P)
    return lambda: torch.autograd.grad(out, leaves, contender.grad, retain_graph=True)


def save(run: KernelRun, folder: pathlib.Path) -> None:
    """Print the report and write it as JSON, Markdown and, where matplotlib is installed, PNG."""
    stem = folder / f"kernels-{run.settings.dtype}"
    write(run, markdown(run), stem)
    with contextlib.suppress(ImportError):
        plot(run, stem.with_suffix(".png"))
