"""What the benchmark of the ops finds: the fields of its JSON file."""

import dataclasses

from bench.machine import Machine
from bench.roofline import Rates
from bench.timing import Quartiles


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """The options of the run, the version of torch, and a description of each step."""

    dtype: str
    rounds: int
    torch: str
    steps: dict[str, str]


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """One contender in one step of an op at one size.

    Attributes:
        op, size, lengths, tokens: as in `jobs.Job`.
        step: "inference", "forward" or "backward".
        contender: its name.
        bytes, flops, floor: the least work of the step, and the seconds that it takes at the least.
        seconds: over the rounds; None where the contender was refused.
        speedup: its seconds over ours, paired round by round.
        difference: of its results from those in float64, see `row_error`; None where it failed.
        problem: why it was refused.
        rounds: seconds of each round.
        host: the host's seconds on a GPU, where `seconds` are the kernels' own; None on a CPU.
    """

    op: str
    size: str
    lengths: str
    tokens: int
    step: str
    contender: str
    bytes: int
    flops: int
    floor: float
    seconds: Quartiles | None
    speedup: Quartiles | None
    difference: float | None
    problem: str | None
    rounds: list[float]
    host: Quartiles | None = None


@dataclasses.dataclass
class KernelRun:
    """Contenders in turn on several jobs.

    Attributes:
        implementations: of erniem_fast, by op.
        left_out: names of jobs for which there was no time.
        interrupted: by Ctrl-C.
    """

    date: str
    machine: Machine
    settings: KernelSettings
    implementations: dict[str, str]
    rates: Rates
    results: list[StepFigures]
    left_out: list[str]
    interrupted: bool


@dataclasses.dataclass(frozen=True)
class LaunchFigures:
    """One way to launch a kernel.

    Attributes:
        launch: the configuration in words.
        takes: what its kernels take of a multiprocessor, in words; empty where that is not known.
        seconds: over the rounds; None where it was not timed.
        gain: the shipped one's seconds over its own, paired round by round.
        difference: of its results from the shipped one's, see `row_error`.
        problem: why it was not timed.
        rounds: seconds of each round.
    """

    launch: str
    takes: str
    seconds: Quartiles | None
    gain: Quartiles | None
    difference: float | None
    problem: str | None
    rounds: list[float]


@dataclasses.dataclass(frozen=True)
class ProblemFigures:
    """The launches of a problem.

    Attributes:
        op, step, lengths, dropout: as in `candidates.Problem`.
        tokens: their number.
        bytes, flops, floor: the least work, and the seconds that it takes at the least.
        launches: the shipped one first.
    """

    op: str
    step: str
    lengths: str
    dropout: bool
    tokens: int
    bytes: int
    flops: int
    floor: float
    launches: list[LaunchFigures]


@dataclasses.dataclass
class SweepRun:
    """Launches in turn, problem after problem.

    Attributes:
        tokens: how many were asked for.
        left_out: names of problems for which there was no time.
        interrupted: by Ctrl-C.
    """

    date: str
    machine: Machine
    torch: str
    rounds: int
    tokens: int
    rates: Rates
    problems: list[ProblemFigures]
    left_out: list[str]
    interrupted: bool
