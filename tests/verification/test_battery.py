"""`python -m erniem_fast verify`, and what it must not let pass."""

import os
import re
import subprocess
import sys

import pytest
import torch

from erniem_fast import flags
from erniem_fast.kernels import add_norm
from erniem_fast.native import library
from erniem_fast.ops.choose import arguments_of
from erniem_fast.verification import battery, command

CPU = torch.device("cpu")
OPS = (*flags.OPS, "quantise")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORWARD, BACKWARD = add_norm.forward, add_norm.backward


SUM = r"(\w+) +(\w+) +(\d+) checks, (\d+) failures, largest error (beyond the bound|[01]\.\d\d of its bound), [\d.]+ s"

# The command with the battery's smallest cases, in a process that starts itself again for the interpreter.
COMMAND = """
import sys
from erniem_fast import __main__
from erniem_fast.verification import battery
small = battery._small
battery._HARD, battery._QUANTISED, battery._small = (), battery._QUANTISED[:2], lambda sizes: small((1,))
sys.argv[1:] = ["verify", "-v"]
sys.exit(__main__.main())
"""


def test_the_command_reports_every_check(tmp_path):
    settings = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    heading, *lines, summary = done.stdout.splitlines()
    assert heading == "No GPU: what is written in Triton runs in Triton's interpreter."
    unchecked = [line for line in lines if "is not checked" in line]
    for op in ("embeddings", "product", "int8"):
        assert f"{op}: native is not checked: {library.NOT_BUILT}" in unchecked
    sums = [found.groups() for line in lines if (found := re.fullmatch(SUM, line))]
    assert {op: failures for op, _, _, failures, _ in sums} == dict.fromkeys(OPS, "0")
    lines = [line for line in lines if line not in unchecked and not re.fullmatch(SUM, line)]
    assert sum(int(checks) for _, _, checks, *_ in sums) == len(lines)
    assert summary == f"{len(lines)} checks, 0 failures"
    assert all(line.startswith(f"{number:3}/{len(lines)} ") for number, line in enumerate(lines, 1))
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert {tuple(line.split()[1:4]) for line in lines} == {(op, "triton", dtype) for op in OPS for dtype in dtypes}
    for line in lines:
        error, bound = line.partition(" error ")[2].split("  ")[0].split(", bound ")
        assert float(error) <= float(bound)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_battery_passes(op, dtype):
    checks = [
        check
        for check in battery.battery(CPU)
        if (check.op, check.implementation, check.dtype) == (op, "triton", dtype)
    ]
    assert checks
    assert [each.line for each in map(battery.outcome, checks) if not each.passed] == []


def broken(wrong):
    def forward(**inputs):
        out, z = FORWARD(**arguments_of(FORWARD, inputs))
        return wrong(out), z

    return forward


def unlaunchable(out):
    raise RuntimeError("out of shared memory")


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda out: out.index_fill(1, torch.tensor([-1]), 9), "result         error "),
        (torch.empty_like, "result         error nan, bound "),
        (lambda out: out.double(), "RuntimeError: result is torch.float64, not torch.float32"),
        (lambda out: out[:-1], "RuntimeError: Mismatch in shape"),
        (unlaunchable, "RuntimeError: out of shared memory"),
    ],
    ids=["wrong", "unwritten", "dtype", "shape", "raises"],
)
def test_a_broken_kernel_is_a_failure(wrong, line, monkeypatch, capsys):
    case = next(
        case for case in battery._HARD if case.op == "add_norm" and case.shape == "18 tokens x 768, p 0.0, no bias"
    )
    monkeypatch.setattr(battery, "_HARD", (case,))
    monkeypatch.setattr(battery, "_small", lambda sizes: ())
    for others in ("_QUANTISED", "_PRODUCTS", "_INT8"):
        monkeypatch.setattr(battery, others, ())
    assert command._verify_kernels() == 0
    _, *sums, _ = capsys.readouterr().out.splitlines()
    assert all(" 0 failures, largest error 0." in each for each in sums)  # a check that passes has no line
    monkeypatch.setattr(add_norm, "forward", broken(wrong))
    assert command._verify_kernels() == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    single, *halves, total = (each for each in lines if re.search(r"add_norm +triton ", each))
    assert re.fullmatch(SUM, total).groups() == ("add_norm", "triton", "3", "3", "beyond the bound")
    assert line in single
    assert [each.endswith("  FAIL") for each in (single, *halves)] == [True] * 3
    assert summary.endswith(" checks, 3 failures")


def fused(grad, z, norm, dropout):
    """The gradients as with a fused multiply-add: of the product and its mean, which is equal, one is not rounded."""
    grad_z, grad_x, *sums = BACKWARD(grad, z, norm, dropout)
    product = grad.double() * norm.weight.double()
    rounding = ((product - product.float()) * norm.eps**-0.5).float()
    return grad_z + rounding, grad_x, *sums


def unsubtracted(grad, z, norm, dropout):
    grad_z, grad_x, *sums = BACKWARD(grad, z, norm, dropout)
    return grad_z + 1e-4 * grad, grad_x, *sums


@pytest.mark.parametrize(("backward", "holds"), [(fused, True), (unsubtracted, False)])
def test_one_feature_may_leave_a_rounding_of_the_terms_that_cancel(backward, holds, monkeypatch):
    """The reference's gradients are 0 exactly: with one feature, the layer norm is constant."""
    case = next(case for case in battery._small((1,)) if case.op == "add_norm")

    def replaced(**inputs):
        return backward(**arguments_of(BACKWARD, inputs))

    monkeypatch.setattr(add_norm, "backward", replaced)
    comparison = battery.Check(case, "triton", torch.float32, CPU).run()["residual"]
    assert comparison.error > 0
    assert comparison.holds is holds


def test_nothing_to_check_is_no_success(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not battery.verify(torch.device("meta"))
    out = capsys.readouterr().out
    assert "attention: triton is not checked: Triton has no kernels for meta" in out
    assert out.endswith("0 checks, 0 failures\n")
