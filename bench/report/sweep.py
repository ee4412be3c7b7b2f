"""A sweep of launch configurations in Markdown."""

from collections.abc import Iterator

from bench.kernels.figures import LaunchFigures, ProblemFigures, SweepRun
from bench.report.parts import table


def markdown(run: SweepRun) -> str:
    """The whole report: the best of each problem, then all launches, the fastest first."""
    rates = run.rates
    method = (
        f"Medians and quartiles of {run.rounds} rounds, launches in turn, results compared first; a gain is the shipped"
        f" one's time over a launch's, taken round by round. A floor is what a copy at"
        f" {rates.bytes_per_second / 1e9:,.0f} GB/s or a matrix product at {rates.flops_per_second / 1e12:,.0f} TFLOP/s"
        f" takes, both measured here. torch {run.torch}. {run.date[:10]}."
    )
    title = f"### Launches of the kernels in bfloat16 on {run.machine.gpu or run.machine.cpu}"
    return "\n\n".join([title, method, summary(run), *map(_all, run.problems)]) + "\n"


def summary(run: SweepRun) -> str:
    """The best launch of each problem, and what is missing."""
    header = ["problem", "floor us", "shipped us", "floor / shipped", "fastest us", "gain (quartiles)", "fastest"]
    return "\n\n".join([table(header, [_best(problem) for problem in run.problems]), *_notes(run)])


def _best(problem):
    shipped, timed = problem.launches[0], _timed(problem)
    row = [_name(problem), _us(problem.floor)]
    if shipped.seconds is None or not timed:
        return [*row, "not timed", "", "", "", shipped.problem or ""]
    fastest = timed[0]
    reached = f"{problem.floor / shipped.seconds.median:.0%}"
    launch = "the shipped one" if fastest is shipped else fastest.launch
    return [*row, _us(shipped.seconds.median), reached, _us(fastest.seconds.median), _gain(fastest), launch]


def _notes(run) -> Iterator[str]:
    if run.left_out:
        yield f"**Left out** for lack of time: {'; '.join(run.left_out)}."
    if run.interrupted:
        yield "**Interrupted**: the rest is missing."


def _all(problem: ProblemFigures) -> str:
    rows = [[_launch(problem, each), *_cells(problem, each)] for each in _timed(problem)]
    rows += [
        [_launch(problem, each), "", "", "", each.takes, each.problem]
        for each in problem.launches
        if each.seconds is None
    ]
    header = ["launch", "microseconds (quartiles)", "floor / time", "gain (quartiles)", "takes", "problem"]
    return f"#### {_name(problem)}, {problem.tokens:,} tokens, floor {_us(problem.floor)}\n\n{table(header, rows)}"


def _cells(problem, launch: LaunchFigures) -> list[str]:
    seconds = launch.seconds
    times = f"{_us(seconds.median)} ({_us(seconds.q1)}-{_us(seconds.q3)})"
    return [times, f"{problem.floor / seconds.median:.0%}", _gain(launch), launch.takes, ""]


def _launch(problem, launch):
    return f"**{launch.launch}** (shipped)" if launch is problem.launches[0] else launch.launch


def _gain(launch):
    gain = launch.gain
    return f"{gain.median:.2f}x ({gain.q1:.2f}-{gain.q3:.2f})" if gain else ""


def _timed(problem) -> list[LaunchFigures]:
    timed = [launch for launch in problem.launches if launch.seconds]
    return sorted(timed, key=lambda launch: launch.seconds.median)


def _name(problem):
    return f"{problem.op} {problem.step}, {problem.lengths}, {'dropout' if problem.dropout else 'plain'}"


def _us(seconds):
    return f"{seconds * 1e6:,.1f}"
