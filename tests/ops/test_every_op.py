"""What all ops have in common: what must not change a result, and autograd."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from erniem_fast import flags, ops
from erniem_fast.batch import Sequences, TokenBatch
from erniem_fast.flags import use_implementations
from erniem_fast.ops.choose import parameters
from erniem_fast.reference import Norm
from tests.batches import dropout_of
from tests.ops.problems import (
    BATCHES,
    CPU,
    DTYPES,
    EPS,
    HOLES,
    PADDING,
    TOKENS,
    assert_rule_one,
    every_implementation,
    largest,
    problem_of,
    serving,
    solve,
    views,
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("op", "implementation"),
    [(op, name) for op in ("bias_gelu", "add_norm", "embeddings") for name in serving(op)],
)
def test_gradients_summed_over_many_tokens(op, implementation, dtype):
    """4,096 tokens, where the order and the dtype of a sum show."""
    with use_implementations(**{op: implementation}):
        assert_rule_one(problem_of(op, dtype, TokenBatch.padded((16, 256), CPU), p=0.0))


@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        (op, name)
        for op in flags.OPS
        if "dropout" in parameters(getattr(ops, op))
        for name in serving(op, interpreted=True)
    ],
)
def test_dropping_nothing_and_everything(op, implementation):
    with use_implementations(**{op: implementation}):
        problem = problem_of(op, p=0.0)
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        without = solve(problem.ours, problem.leaves, grad)
        torch.manual_seed(0)
        seeded = problem_of(op, p=1e-12)  # a seed, and a rate below 2^-32
        for name, value in solve(seeded.ours, problem.leaves, grad).items():
            torch.testing.assert_close(value, without[name], rtol=1e-5, atol=1e-5)
        everything = solve(problem_of(op, p=1.0).ours, problem.leaves, grad)
    assert all(bool(value.isfinite().all()) for value in everything.values())
    if op == "add_norm":
        assert largest(everything["x"]) == largest(everything["bias"]) == 0.0
        normal = F.layer_norm(problem.leaves["residual"], (96,), *list(problem.leaves.values())[2:4], EPS)
        torch.testing.assert_close(everything["result"], normal, rtol=0, atol=1e-5)
    else:
        assert {largest(value) for value in everything.values()} == {0.0}


@every_implementation
def test_layout_of_inputs_and_gradients(op, implementation):
    problem = problem_of(op)
    with use_implementations(**{op: implementation}):
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        expected = solve(problem.ours, problem.leaves, grad)
        flat = {name: leaf for name, leaf in problem.leaves.items() if leaf.dim() == 1}
        wide = {name: tuple(views(leaf)) for name, leaf in problem.leaves.items() if leaf.dim() == 2}
        for index, grad_out in enumerate(views(grad)):
            strided = {name: each[index] for name, each in wide.items()}
            strided |= {name: leaf.repeat_interleave(2)[::2] for name, leaf in flat.items()}
            leaves = {name: strided[name] for name in problem.leaves}
            for name, value in solve(problem.ours, leaves, grad_out).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=4e-6)


@every_implementation
def test_layout_of_the_batch(op, implementation):
    """The tensors inside of `Sequences` and `Dropout`, which kernels read by their addresses too."""
    batch = BATCHES["holes, packed"]
    every_other = [each.repeat_interleave(2)[::2] if isinstance(each, Tensor) else each for each in batch.sequences]
    columns = batch.columns.repeat_interleave(2)[::2]
    strided = replace(batch, sequences=Sequences(*every_other), columns=columns)
    found = []
    with use_implementations(**{op: implementation}):
        for each in (batch, strided):
            torch.manual_seed(0)
            problem = problem_of(op, batch=each, p=0.3)
            found.append(solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96)))
    assert all(torch.equal(found[1][name], each) for name, each in found[0].items())


@every_implementation
def test_inputs_that_are_negated_views(op, implementation):
    """Their memory holds the values with the other sign."""
    problem = problem_of(op)
    negated = {name: torch._neg_view(-leaf) for name, leaf in problem.leaves.items()}
    grad = torch.randn(TOKENS, 96)
    with use_implementations(**{op: implementation}):
        expected, found = (solve(problem.ours, leaves, grad) for leaves in (problem.leaves, negated))
        inferred = problem.ours(*negated.values())
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert torch.equal(inferred, expected["result"])


@pytest.mark.parametrize("op", ["add_norm", "embeddings"])
def test_a_layer_norm_without_a_bias(op):
    problem = problem_of(op)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if name != "norm_bias"}
    grad, names = torch.randn(TOKENS, 96), list(problem.leaves)

    def ours(*values, norm_bias=None):
        found = dict(zip(leaves, values, strict=True))
        return problem.ours(*(found.get(name, norm_bias) for name in names))

    zeros = torch.zeros(96)
    for implementation in serving(op, interpreted=True):
        with use_implementations(**{op: implementation}):
            found, expected = (solve(partial(ours, norm_bias=bias), leaves, grad) for bias in (None, zeros))
            inferred = ours(*leaves.values())
        assert all(torch.equal(found[name], each) for name, each in expected.items())
        assert torch.equal(inferred, expected["result"])


@every_implementation
def test_a_gradient_of_one_value(op, implementation):
    """`sum().backward()` gives a gradient with strides of zero."""
    problem = problem_of(op)
    with use_implementations(**{op: implementation}):
        out = problem.ours(*problem.leaves.values())
        expected = solve(problem.ours, problem.leaves, torch.ones_like(out))
        for name, value in solve(problem.ours, problem.leaves, out.new_ones(1, 1).expand_as(out)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@every_implementation
def test_bits_are_the_same_again(op, implementation):
    problem = problem_of(op, batch=BATCHES["short"])
    with use_implementations(**{op: implementation}):
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        first, second = (solve(problem.ours, problem.leaves, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_implementation
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_packed_and_padded_agree_at_real_tokens(op, implementation, p):
    """Forward, where the two layouts differ in all but the tokens' coordinates."""
    mask = torch.tensor([[value == "1" for value in row] for row in HOLES])
    packed, padded = BATCHES["holes, packed"], BATCHES["holes, padded"]
    outputs = []
    with use_implementations(**{op: implementation}):
        if op == "embeddings":
            ids, tables = torch.randint(0, 50, mask.shape), [torch.randn(50, 96), torch.randn(12, 96)]
            norm = Norm(torch.rand(96), torch.randn(96), EPS)
            for batch in (packed, padded):
                rows = (batch.pack(ids), batch.columns + 2)
                out = ops.embeddings(*rows, *tables, norm, PADDING, dropout_of(batch, p))
                outputs.append(batch.unpack(out)[mask])
        else:
            leaves = problem_of(op, batch=padded).leaves
            for batch in (packed, padded):
                inputs = [
                    batch.pack(leaf.unflatten(0, mask.shape)) if leaf.dim() == 2 else leaf for leaf in leaves.values()
                ]
                outputs.append(batch.unpack(problem_of(op, batch=batch, p=p).ours(*inputs))[mask])
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("op", "implementation"), [(op, name) for op in flags.OPS for name in serving(op)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_leaves_ops_alone(op, implementation, dtype, p):
    """The dtype of a result is a function of the inputs', and the arithmetic inside is ours to choose."""
    problem = problem_of(op, dtype, p=p)
    with use_implementations(**{op: implementation}):
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        outside = solve(problem.ours, problem.leaves, grad)
        with torch.autocast("cpu", torch.bfloat16):
            inside = solve(problem.ours, problem.leaves, grad)
    for name, value in outside.items():
        assert inside[name].dtype == value.dtype, name
        assert torch.equal(inside[name], value), name


@pytest.mark.parametrize("op", flags.OPS)
def test_each_leaf_alone_gets_its_gradient(op):
    problem = problem_of(op)
    grad = torch.randn_like(problem.ours(*problem.leaves.values()))
    expected = solve(problem.ours, problem.leaves, grad)
    for name in problem.leaves:
        leaves = {each: leaf.clone().requires_grad_(each == name) for each, leaf in problem.leaves.items()}
        problem.ours(*leaves.values()).backward(grad)
        assert torch.equal(leaves[name].grad, expected[name]), name
        assert all(leaf.grad is None for each, leaf in leaves.items() if each != name)


@pytest.mark.parametrize("op", flags.OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(op, mode):
    problem = problem_of(op)
    expected = problem.ours(*(leaf.requires_grad_() for leaf in problem.leaves.values()))
    with mode(), torch.profiler.profile() as profile:
        out = problem.ours(*problem.leaves.values())
    assert not out.requires_grad
    assert torch.equal(out, expected)
    # The custom op would cost time, and would save tensors for a backward that does not come.
    assert not any(event.name.startswith("erniem_fast::") for event in profile.events())


@pytest.mark.parametrize("op", flags.OPS)
def test_autograd_alone_needs_no_custom_op(op):
    """The dispatcher's part of a custom op takes the host longer than the launch of a kernel."""
    problem = problem_of(op)
    grad = torch.randn_like(problem.ours(*problem.leaves.values()))
    expected = solve(problem.ours, problem.leaves, grad)
    with torch.profiler.profile() as profile:
        result = solve(problem.ours, problem.leaves, grad)
    names = {event.name for event in profile.events()}
    assert op in names  # by its autograd function
    assert not any(name.startswith("erniem_fast::") for name in names)
    with FlopCounterMode(display=False), torch.profiler.profile() as profile:  # sees operators of the dispatcher only
        counted = solve(problem.ours, problem.leaves, grad)
    names = {event.name for event in profile.events()}
    assert {f"erniem_fast::{op}", f"erniem_fast::{op}_backward"} <= names
    for name, value in expected.items():
        assert torch.equal(result[name], value), name
        assert torch.equal(counted[name], value), name


def test_float64_to_the_last_digits():
    for op in flags.OPS:
        problem = problem_of(op, torch.float64)
        grad = torch.randn(problem.oracle(*problem.leaves.values()).shape, dtype=torch.float64)
        exact = solve(problem.oracle, problem.leaves, grad)
        for name, value in solve(problem.ours, problem.leaves, grad).items():
            torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-12)
