"""The bench of the kernels: its figures, what it refuses, and whole runs on the CPU."""

import dataclasses
import json
import pathlib
import re
from functools import partial

import pytest
import torch

from bench import timing
from bench.difference import LARGEST_ERROR
from bench.kernels import jobs, speed
from bench.kernels.figures import KernelRun
from bench.record import read
from bench.report.kernels import markdown
from bench.roofline import Rates
from bench.timing import Taken
from erniem_fast.flags import use_kernels

CPU = torch.device("cpu")
RATES = Rates(bytes_per_second=1e9, flops_per_second=1e10)


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setitem(jobs.MAKERS, "embeddings", partial(jobs._embeddings, words=100))


@pytest.fixture
def clock(monkeypatch):
    """Makes every call take as many seconds as it returns."""
    monkeypatch.setattr(timing, "time_call", lambda call, device, flush: call())


def job_of(op, lengths="8", tokens=16):
    return jobs.make_job(op, "base", lengths, tokens, torch.float32, CPU, compiled=False)


@pytest.mark.parametrize(
    ("op", "step", "size", "flops"),
    [
        ("attention", "inference", 16 * 4 * 768 * 4, 4 * 2 * 8 * 8 * 768),
        ("attention", "backward", 16 * 8 * 768 * 4, 10 * 2 * 8 * 8 * 768),
        ("bias_gelu", "backward", 16 * 3 * 3072 * 4, 0),
        ("add_norm", "forward", 16 * 4 * 768 * 4, 0),
        ("embeddings", "inference", 16 * 2 * 768 * 4, 0),
    ],
)
def test_the_least_work_of_a_step(op, step, size, flops):
    """Two sequences of eight tokens of the base model, in float32."""
    assert job_of(op).work[step] == (size, flops)


def test_ragged_lengths_are_packed_for_ours_and_padded_for_others():
    job = job_of("attention", "ragged", 1024)
    ours, eager, *_ = job.contenders
    assert ours.leaves[0].shape == (job.tokens, 3 * 768)
    assert eager.leaves[0].shape[0] == 4
    assert eager.leaves[0].shape[:2].numel() > job.tokens
    assert eager.forward(0.0).shape == (*eager.leaves[0].shape[:2], 768)


@pytest.mark.parametrize("op", jobs.MAKERS)
def test_contenders_agree(op):
    checks = list(speed.check(job_of(op, "ragged", 768), 1e-4))
    assert [problem for _, _, problem in checks] == [None] * len(checks)
    assert all(0 < error < 1e-6 for _, error, _ in checks)  # it computes in float64 what they compute


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("op", ["attention", "bias_gelu", "add_norm"])
def test_the_kernels_themselves_agree(op):
    """In the interpreter, which is not chosen on a CPU unless a flag asks for it."""
    with use_kernels(attention="triton", bias_gelu="triton", layernorm="triton"):
        checks = list(speed.check(job_of(op), 1e-4))
    assert [problem for _, _, problem in checks] == [None] * len(checks)
    assert checks[0][1] != checks[1][1]  # PyTorch's own kernels round otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", jobs.MAKERS)
def test_rounding_to_16_bits_is_no_mistake(op, dtype):
    """PyTorch's attention in 16 bits rounds scores and probabilities too."""
    lengths = "256" if op == "attention" else "8"
    job = jobs.make_job(op, "base", lengths, 512, dtype, CPU, compiled=False)
    (eager,) = (each for each in job.contenders if each.name == jobs.EAGER)
    tolerance = LARGEST_ERROR[str(dtype).removeprefix("torch.")]
    wrong = [
        broken(eager, forward=lambda p: eager.forward(p) * (1 + 1.5 * tolerance)),
        broken(eager, forward=lambda p: one_token_wrong(eager.forward(p))),
    ]
    checks = list(speed.check(dataclasses.replace(job, contenders=[*job.contenders, *wrong]), tolerance))
    *right, scaled, one_wrong = checks
    assert all(error < tolerance / 2 for _, error, _ in right)
    assert [problem for _, _, problem in right] == [None] * len(right)
    assert None not in (scaled.problem, one_wrong.problem)


def one_token_wrong(out):
    return torch.cat([out.flatten(0, -2)[:-1], out.flatten(0, -2)[-1:] * 1.1]).view_as(out)


def broken(contender, **changes):
    return dataclasses.replace(contender, name="broken", **changes)


def test_wrong_and_failing_contenders_are_refused_and_the_rest_is_measured(clock):
    job = job_of("add_norm")
    ours, eager = job.contenders

    def fails(p):
        raise RuntimeError("out of luck\nand more")

    wrong = broken(eager, forward=lambda p: eager.forward(p) * 1.01)
    wrong_gradient = broken(eager, forward=lambda p: eager.forward(p).detach() + 0 * eager.forward(p))
    job = dataclasses.replace(job, contenders=[broken(ours, forward=fails), ours, wrong, wrong_gradient, eager])
    problems = [problem for _, _, problem in speed.check(job, 1e-3)]
    assert problems[0] == "add_norm, base, 8: broken failed: out of luck"
    assert "broken refused: its error is 0.01 in the result and 0.01 in a gradient (0.001 is allowed)" in problems[2]
    assert re.search(r"broken refused: its error is \d[.\d]*e-\d\d in the result and 1 in a gradient", problems[3])
    assert (problems[1], problems[4]) == (None, None)


def test_floors_and_ratios(monkeypatch):
    taken = [[Taken(1.0, 0.5), Taken(10.0, 1.5)], [Taken(2.0, 1.0), Taken(30.0, 1.0)]]
    monkeypatch.setattr(speed, "take_turns", lambda calls, *_: taken)
    job = job_of("bias_gelu")
    ours, eager = speed.measure(job, 1e-4, 2, RATES, CPU, None)[:2]
    assert ours.floor == 16 * 2 * 3072 * 4 / 1e9
    assert (ours.seconds.median, ours.speedup.median) == (5.5, 1.0)
    assert (eager.seconds.median, eager.speedup.median) == (16.0, 2.5)
    assert (ours.host.median, eager.host.median) == (1.0, 1.0)
    job = job_of("attention", "512", 1024)
    job = dataclasses.replace(job, contenders=job.contenders[:2])
    attention = speed.measure(job, 1e-4, 2, dataclasses.replace(RATES, bytes_per_second=1e15), CPU, None)
    assert attention[0].floor == 4 * 2 * 512 * 512 * 768 / 1e10


def run(tmp_path, *options):
    code = speed.main(["--rounds", "2", "--output", str(tmp_path), *options])
    return code, read(KernelRun, tmp_path / "kernels-float32.json")


def test_a_whole_run(tmp_path, capsys):
    code, saved = run(tmp_path, "--tokens", "64", "--lengths", "32", "--sizes", "base", "--no-compile")
    assert code == 0
    assert {(result.op, result.step) for result in saved.results} == {
        (op, step) for op in jobs.MAKERS for step in speed.STEPS
    }
    assert all(min(result.rounds) > 0 and len(result.rounds) == 2 for result in saved.results)
    assert (tmp_path / "kernels-float32.png").read_bytes().startswith(b"\x89PNG")
    assert "attention, base, 32, 64 tokens" in capsys.readouterr().out
    assert str(pathlib.Path.home()) not in json.dumps(dataclasses.asdict(saved))


def test_what_the_budget_leaves_out_is_told(tmp_path, monkeypatch):
    moments = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(speed, "seconds_now", lambda: next(moments))
    code, saved = run(tmp_path, "--ops", "add_norm", "--tokens", "8", "--no-compile", "--budget", "10")
    assert code == 0
    assert saved.left_out == ["add_norm, large, 512"]
    assert "**Left out** for lack of time: add_norm, large, 512." in markdown(saved)
