"""The sweep of launch configurations: what it tries, what it refuses, and a run of it in the interpreter."""

import contextlib
import dataclasses
import re
from concurrent.futures import Future

import pytest
import torch

from bench.kernels import candidates, sweep
from bench.kernels.candidates import Problem, launches, make_call, problems
from bench.kernels.figures import LaunchFigures, ProblemFigures, SweepRun
from bench.kernels.jobs import make_batch
from bench.machine import describe
from bench.record import read, write
from bench.report.sweep import markdown
from bench.roofline import Rates
from bench.timing import Quartiles
from erniem_fast.kernels import add_norm, attention, bias_gelu
from erniem_fast.kernels.device import Device
from erniem_fast.ops.triton_interpreter import mended_floats

CPU = torch.device("cpu")
HOPPER = Device("sm_90", multiprocessors=132, lanes=32)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
def test_launches_differ_and_the_shipped_one_is_first(problem):
    found = launches(problem, make_batch(problem.lengths, 2048, CPU), HOPPER, torch.bfloat16)
    configs = [each["config"] for each in found]
    assert len({(each["config"], each.get("one_pass")) for each in found}) == len(found) >= 6
    swept = {"step", "warps", "stages"} if problem.op == "attention" else {"rows", "warps", "stages", "programs"}
    if problem.op == "attention" and problem.lengths == "64" and problem.step != "backward":
        swept.remove("warps")  # 64 queries are those of one group of warps
    for field in dataclasses.fields(configs[0]):
        values = {getattr(config, field.name) for config in configs}
        assert len(values) > 1 or field.name not in swept, field.name
    if problem.op == "attention" and problem.step == "backward":
        assert {each["one_pass"] for each in found} == {True, False}


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            numbers = [each for each in arguments if not isinstance(each, torch.Tensor)]
            self.log.append((self.name, grid, numbers, options))

        return launch


@pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
def test_what_counts_as_shipped_is_what_is_launched_without_a_choice(problem, monkeypatch):
    log = []
    for module in (attention, add_norm, bias_gelu):
        monkeypatch.setattr(module, "describe", lambda _: HOPPER)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, log))
    batch = make_batch(problem.lengths, 4096, CPU)
    call = make_call(problem, batch, zeros)
    shipped, *others = launches(problem, batch, HOPPER, torch.bfloat16)

    def launched(**launch):
        log.clear()
        call(**launch)
        return list(log)

    assert launched(**shipped) == launched()
    assert all(launched(**other) != launched() for other in others)


def test_wrong_unwritten_and_failing_launches_are_not_timed():
    exact = torch.randn(16, 64).bfloat16()

    def call(kind):
        if kind == "fails":
            raise RuntimeError("out of resource: shared memory\nand more")
        if kind == "half":
            out = torch.empty_like(exact)
            out[:8] = exact[:8]
            return (out,)
        return (exact * {"shipped": 1, "wrong": 1.1, "other": 1.01}[kind],)

    kinds = ["shipped", "other", "wrong", "half", "fails", "late"]
    found = sweep.check(call, [{"kind": kind} for kind in kinds], [None] * 5 + [sweep.NOT_COMPILED])
    (shipped, other, wrong, half, fails, late) = found
    assert shipped == (0.0, None)
    assert 0 < other[0] < 0.02
    assert other[1] is None
    assert wrong[1] == "differs by 0.1"
    assert half[1] == "differs by nan"
    assert fails == (None, "fails: out of resource: shared memory")
    assert late == (None, "not compiled in time")
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_the_shipped_one_nothing_is_compared():
    found = sweep.check(lambda: (torch.ones(2, 2),), [{}, {}], ["does not compile: why", None])
    assert [failure for _, failure in found] == [
        "does not compile: why",
        "not compared, because the shipped one is missing",
    ]


def done(failure=None):
    future = Future()
    future.set_result(sweep.Compiled(failure, "128 registers"))
    return future


def run_of(*figures, **changes):
    rates = Rates(bytes_per_second=1e9, flops_per_second=1e12)
    run = SweepRun("2026-11-26", describe(CPU), torch.__version__, 1, 16, rates, list(figures), [], False)
    return dataclasses.replace(run, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("op", ["attention", "bias_gelu", "add_norm"])
def test_problems_run(op, monkeypatch):
    """In the interpreter: the shipped launch, another one, and one that is not compiled yet."""
    all_launches = candidates.launches

    def few(*arguments):
        return all_launches(*arguments)[:3]

    monkeypatch.setattr(sweep, "launches", few)
    monkeypatch.setattr(candidates, "HEADS", 1)
    monkeypatch.setattr(candidates, "HIDDEN", candidates.HEAD_DIM)
    monkeypatch.setattr(candidates, "FEATURES", 256)
    steps = {(each.step, each.dropout) for each in problems() if each.op == op}
    for step, dropout in steps:
        problem = Problem(op, step, "64", dropout)
        with mended_floats():
            figures = sweep.measure(problem, run_of(), CPU, [done(), done(), Future()])
        shipped, other, late = figures.launches
        assert (shipped.problem, other.problem, late.problem) == (None, None, "not compiled in time")
        assert shipped.difference == 0.0
        assert (shipped.gain.median, other.gain.median) == (1.0, shipped.seconds.median / other.seconds.median)
        assert figures.floor > 0


def test_figures_are_kept_after_each_problem_and_the_rest_is_told(tmp_path, monkeypatch):
    moments = iter([0.0, 5.0, 11.0, 12.0])
    monkeypatch.setattr(sweep, "seconds_now", lambda: next(moments))

    @contextlib.contextmanager
    def compiled(wanted, *_):
        yield {problem: [done()] for problem in wanted}

    monkeypatch.setattr(sweep, "compiling", compiled)
    stem, kept = tmp_path / "sweep", []

    def measure(problem, run, device, compilations):
        kept.append(stem.with_suffix(".json").exists() and len(read(SweepRun, stem.with_suffix(".json")).problems))
        assert [each.result().failure for each in compilations] == [None]
        return ProblemFigures(*problem, 16, 1, 2, 3.0, [LaunchFigures("a", "", None, None, None, "fails", [])])

    monkeypatch.setattr(sweep, "measure", measure)
    run = run_of()
    wanted = problems()[:4]
    sweep.run_problems(wanted, run, CPU, 10.0, stem)
    assert kept == [False, 1]
    measured = [(each.op, each.step) for each in read(SweepRun, stem.with_suffix(".json")).problems]
    assert measured == [(each.op, each.step) for each in wanted[:2]]
    assert run.left_out == [problem.name for problem in wanted[2:]]


def test_launches_compile_ahead(compiling):
    """For a GPU that is not here, from tensors on the CPU; a tile that is no power of two does not."""
    code = """
import json
import torch
from bench.kernels.candidates import Problem, launches
from bench.kernels.jobs import make_batch
from bench.kernels.sweep import compile_launch
from dataclasses import replace
from erniem_fast.kernels.device import Device
problem, device = Problem("attention", "backward", "64", True), Device("sm_90", 132, 32)
shipped, *_ = launches(problem, make_batch("64", 128, torch.device("cpu")), device, torch.bfloat16)
wrong = {**shipped, "config": replace(shipped["config"], step=48)}
print(json.dumps([compile_launch("sm_90", problem, 128, launch) for launch in (shipped, wrong)]))
"""
    (failure, takes), (of_wrong, _) = compiling(code)
    assert failure is None
    assert re.fullmatch(r"\d+ registers, \d+ KiB", takes)
    assert of_wrong.startswith("does not compile: ")


def test_the_report_has_the_best_and_the_losers(tmp_path):
    def launch(name, microseconds, gain, problem=None):
        if microseconds is None:
            return LaunchFigures(name, "", None, None, None, problem, [])
        seconds, gain = (Quartiles(value, value, value) for value in (microseconds * 1e-6, gain))
        return LaunchFigures(name, "128 registers", seconds, gain, 0.0, None, [microseconds * 1e-6])

    found = [launch("block 64", 40, 1.0), launch("block 128", 50, 0.8), launch("block 32", 25, 1.6)]
    found.append(launch("block 256", None, None, "fails: out of resource"))
    figures = ProblemFigures("attention", "forward", "512", True, 1024, 10, 20, 20e-6, found)
    run = run_of(figures, left_out=["bias_gelu forward, 512, dropout"])
    text = markdown(run)
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line]
    assert cells[2] == [
        "attention forward, 512, dropout", "20.0", "40.0", "50%", "25.0", "1.60x (1.60-1.60)", "block 32"
    ]  # fmt: skip
    assert [row[0] for row in cells[5:]] == ["block 32", "**block 64** (shipped)", "block 128", "block 256"]
    assert cells[5][-1] == "128 registers"
    assert cells[-1][-1] == "fails: out of resource"
    assert "**Left out** for lack of time: bias_gelu forward, 512, dropout." in text
    write(run, text, tmp_path / "sweep-bfloat16")
    assert read(SweepRun, tmp_path / "sweep-bfloat16.json") == run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="torch finds no CUDA device, and without one there is nothing to time"):
        sweep.main([])
