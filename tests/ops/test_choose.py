"""Which implementation of an op runs."""

from dataclasses import replace

import pytest
import torch

from erniem_fast import flags, ops
from erniem_fast.flags import use_implementations
from tests.ops.problems import problem_of


def run_once(op, dtype=torch.float32):
    problem = problem_of(op, dtype)
    problem.ours(*problem.leaves.values())


@pytest.mark.parametrize("op", flags.OPS)
def test_auto_takes_the_first_that_can_serve(op, calls):
    run_once(op)
    run_once(op, torch.bfloat16)
    assert calls == [("kernel", "forward"), ("torch", "forward")]


@pytest.mark.parametrize("op", flags.OPS)
def test_kernels_off(op, calls, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    run_once(op)
    with use_implementations(**{op: "reference"}):
        run_once(op)
    assert calls == [("torch", "forward"), ("reference", "forward")]


@pytest.mark.parametrize("op", flags.OPS)
def test_flags_are_read_at_every_call(op, calls, monkeypatch):
    for value in ("reference", "torch", "auto"):
        monkeypatch.setenv(flags.OPS[op].name, value)
        run_once(op)
    with use_implementations(**{op: "reference"}):
        run_once(op)
    assert [name for name, _ in calls] == ["reference", "torch", "kernel", "reference"]


@pytest.mark.parametrize("op", flags.OPS)
def test_a_flag_is_the_op_s_own(op, calls):
    with use_implementations(**{op: "reference"}):
        for other in flags.OPS:
            run_once(other)
    assert calls == [("reference" if other == op else "kernel", "forward") for other in flags.OPS]


@pytest.mark.parametrize("op", flags.OPS)
def test_the_backward_runs_what_the_forward_ran(op, calls):
    problem = problem_of(op)
    with use_implementations(**{op: "reference"}):
        out = problem.ours(*(leaf.requires_grad_() for leaf in problem.leaves.values()))
    out.sum().backward()
    assert calls == [("reference", "forward"), ("reference", "backward")]


@pytest.mark.parametrize("op", flags.OPS)
def test_what_cannot_be_served_says_why(op, tables):
    def refuses(device, dtype):
        return f"no {dtype} on {device}; use another"

    tables[op]["reference"] = replace(tables[op]["reference"], refuses=refuses)
    with (
        use_implementations(**{op: "reference"}),
        pytest.raises(RuntimeError, match=r"no torch\.float32 on cpu") as raised,
    ):
        run_once(op)
    assert f"{flags.OPS[op].name}=reference" in str(raised.value)


def test_fuses_bias_follows_the_choice(calls):
    for op in flags.OPS:
        assert ops.fuses_bias(op, torch.zeros(1))
        assert not ops.fuses_bias(op, torch.zeros(1, dtype=torch.bfloat16))
        with use_implementations(**{op: "torch"}):
            assert not ops.fuses_bias(op, torch.zeros(1))
