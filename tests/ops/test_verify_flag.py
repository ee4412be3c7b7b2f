"""`ERNIEM_FAST_VERIFY=1`: the reference beside every op."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from erniem_fast import flags, ops, use_kernels
from erniem_fast.batch import TokenBatch
from erniem_fast.flags import use_implementations
from erniem_fast.ops import Product
from erniem_fast.ops.choose import arguments_of
from erniem_fast.reference import Norm
from tests.ops.problems import (
    BATCHES,
    CPU,
    DTYPES,
    TOKENS,
    add_norm_problem,
    bias_gelu_problem,
    every_implementation,
    norm_leaves,
    problem_of,
    randn,
    serving,
    solve,
)


@pytest.fixture
def verify(monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")


@pytest.mark.parametrize("op", flags.OPS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_verify_accepts_right_results(op, dtype, p, verify):
    for batch in ("short", "unequal", "holes, packed", "holes, padded", "no tokens"):
        problem = problem_of(op, dtype, BATCHES[batch], p)
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        solve(problem.ours, problem.leaves, grad)


def test_verify_accepts_mixed_dtypes(verify):
    for dtype, p in itertools.product(DTYPES.values(), (0.0, 0.3)):
        problem = add_norm_problem(
            BATCHES["short"], dtype, 384, p, torch.float32, residual=torch.float32, norm=torch.float32
        )
        solve(problem.ours, problem.leaves, torch.randn(51, 384))
        problem = bias_gelu_problem(BATCHES["short"], dtype, 384, "gelu", p, bias=torch.float32)
        solve(problem.ours, problem.leaves, torch.randn(51, 384))


@every_implementation
def test_verify_accepts_right_results_of_few_numbers(op, implementation, verify):
    """Sizes of a few features, and dropout that leaves next to nothing: the reference's error may be 0 by luck."""
    for size, dtype, p in itertools.product(range(1, 13), DTYPES.values(), (0.0, 0.999)):
        if implementation not in serving(op, dtype, interpreted=True):
            continue
        problem = problem_of(op, dtype, p=p, size=size, heads=1)
        with use_implementations(**{op: implementation}):
            solve(problem.ours, problem.leaves, torch.randn(TOKENS, size))


@pytest.mark.parametrize("implementation", serving("add_norm", interpreted=True))
def test_verify_accepts_rows_that_are_nearly_constant(implementation, verify):
    for dtype, eps, hidden in itertools.product(DTYPES.values(), (1e-5, 1e-12), (3, 12, 96)):
        if implementation not in serving("add_norm", dtype, interpreted=True):
            continue
        units = torch.randint(-2, 3, (17, hidden)) * torch.finfo(dtype).eps
        residual = (randn(17, 1, dtype=dtype, scale=1000.0) * (1.0 + units)).to(dtype)
        leaves = {"residual": residual, "x": torch.zeros_like(residual), **norm_leaves(hidden, dtype)}
        with use_kernels(layernorm=implementation):
            solve(
                lambda residual, x, *norm, eps=eps: ops.add_norm(residual, Product(x), Norm(*norm, eps)),
                leaves,
                torch.randn(17, hidden),
            )


@pytest.mark.parametrize("op", ["bias_gelu", "add_norm", "embeddings"])
def test_verify_accepts_a_batch_of_training(op, verify):
    problem = problem_of(op, batch=TokenBatch.padded((16, 512), CPU), p=0.1)
    solve(problem.ours, problem.leaves, torch.randn(16 * 512, 96))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_verify_accepts_large_float16(activation, verify):
    x = torch.tensor([[-1e3, -300.0, 0.5, 300.0, 1e3]]).half()
    solve(lambda x: ops.bias_gelu(Product(x), activation), {"x": x}, torch.ones(1, 5))


def off_by_a_little(result):
    changed = result.clone()
    changed.view(-1)[-1] += 2e-5 * result.abs().amax()  # in float32; twenty times the slack
    return changed


def with_a_nan(result):
    changed = result.clone()
    changed.view(-1)[0] = torch.nan
    return changed


WRONG = {
    "value": off_by_a_little,
    "NaN": with_a_nan,
    "infinity": lambda result: torch.full_like(result, torch.inf),
    "zeros": torch.zeros_like,
    "shape": lambda result: torch.cat([result, result]),
    "shape that broadcasts": lambda result: result.unsqueeze(0),
    "dtype": lambda result: result.double(),
}


def broken(right, direction, index, wrong):
    """An implementation whose result number `index` is wrong in one direction."""

    def run(**values):
        function = getattr(right, direction)
        results = function(**arguments_of(function, values))
        if isinstance(results, Tensor):
            return wrong(results)
        return tuple(wrong(each) if place == index else each for place, each in enumerate(results))

    return replace(right, **{direction: run})


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", flags.OPS)
def test_verify_refuses_wrong_results(op, direction, wrong, tables, verify):
    tables[op]["torch"] = broken(tables[op]["torch"], direction, 0, wrong)
    problem = problem_of(op)
    with use_implementations(**{op: "torch"}), pytest.raises(RuntimeError, match=f"^{op} {direction}") as raised:
        solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))
    for part in ("(torch)", "result 0", "torch.float"):
        assert part in str(raised.value)


@pytest.mark.parametrize(("op", "results"), [("embeddings", 4), ("bias_gelu", 2), ("add_norm", 5)])
def test_verify_looks_at_every_gradient(op, results, tables, verify):
    right = tables[op]["torch"]
    problem = problem_of(op)
    for index in range(results):
        tables[op]["torch"] = broken(right, "backward", index, off_by_a_little)
        with use_implementations(**{op: "torch"}), pytest.raises(RuntimeError, match=f"backward .* result {index} "):
            solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))


def test_verify_message_states_error_and_bound(tables, verify):
    tables["bias_gelu"]["torch"] = broken(tables["bias_gelu"]["torch"], "forward", 0, lambda result: result + 0.5)
    with pytest.raises(RuntimeError) as raised, use_kernels(bias_gelu="torch"):
        ops.bias_gelu(Product(torch.ones(3, 8)), "relu")
    message = str(raised.value)
    for part in ("bias_gelu forward (torch)", "(3, 8)", "torch.float32", "5.000e-01"):
        assert part in message
    # Nothing is rounded in relu(1): what is left is eight units in the last place of 1.
    assert f"{8 * torch.finfo(torch.float32).eps:.3e}" in message


def test_verify_is_off_by_default_and_costs_nothing(calls):
    for op in flags.OPS:
        problem = problem_of(op)
        solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))
    assert {name for name, _ in calls} == {"kernel"}


def test_verify_runs_the_reference_in_both_directions(calls, verify):
    for op in flags.OPS:
        calls.clear()
        problem = problem_of(op)
        solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))
        for direction in ("forward", "backward"):
            kernel, *references = (name for name, which in calls if which == direction)
            assert kernel == "kernel"
            assert {*references} == {"reference"}
            assert len(references) % 2 == 0  # in the dtype and in float64
