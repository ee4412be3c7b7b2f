"""What an op's declaration makes: custom ops, their fakes and gradients, and results in an input's memory."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from erniem_fast import flags, ops, use_kernels
from erniem_fast.batch import TokenBatch
from erniem_fast.ops import Product
from erniem_fast.ops.op import Op
from erniem_fast.reference import Norm
from tests.batches import dropout_of
from tests.ops.problems import BATCHES, EPS, PADDING, TOKENS, add_norm_problem, problem_of, randn, serving, solve


def strided(x, layout, requires_grad=True):
    """The values of x in a layout of its own."""
    x = x.t().contiguous().t() if layout == "transposed" else x
    return x.detach().requires_grad_(requires_grad)


def custom_op_calls(implementation, dtype, p, layout, batch=BATCHES["holes, packed"]):
    """The arguments of all eight custom ops, by name."""
    tokens, hidden = batch.tokens, 96
    dropout = dropout_of(batch, p) or [None] * 4

    def wide(columns=hidden, requires_grad=True):
        return strided(randn(tokens, columns, dtype=dtype), layout, requires_grad)

    def table(rows):
        return strided(randn(rows, hidden, dtype=dtype), layout)

    def row(requires_grad=True):
        return torch.rand(hidden).requires_grad_(requires_grad)

    def norm(requires_grad=True):
        return row(requires_grad), row(requires_grad), EPS

    def norm_scale():
        return row(False), EPS

    ranges = torch.tensor([[1, 4]]).expand(tokens, 2).int()
    attended, unmasked, ranged = (
        (*batch.sequences._replace(key_bias=key_bias, key_ranges=key_ranges), 3, 0.2, *dropout)
        for key_bias, key_ranges in ((batch.sequences.key_bias, None), (None, None), (None, ranges))
    )
    rows = (torch.randint(0, 9, (tokens,)), torch.randint(0, 12, (tokens,)))
    grad, nothing_saved, saving = wide(requires_grad=False), torch.empty(0), (True, implementation)
    into_attention = (grad, grad, nothing_saved, wide(3 * hidden, False))
    into_gelu, last = (grad, wide(hidden, False)), (implementation,)
    into_embeddings = (grad, wide(hidden, False), *rows)
    return {
        "attention": (wide(3 * hidden), *attended, *saving),
        "attention, no key bias": (wide(3 * hidden), *unmasked, *saving),
        "attention, key ranges": (wide(3 * hidden), *ranged, *saving),
        "attention_backward, key ranges": (*into_attention, *ranged, *last),
        "attention_backward": (*into_attention, *attended, *last),
        "attention_backward, no key bias": (*into_attention, *unmasked, *last),
        "bias_gelu": (wide(), row(), "gelu", *dropout, *saving),
        "bias_gelu, no bias": (wide(), None, "gelu", *dropout, *saving),
        "bias_gelu_backward": (*into_gelu, row(False), "gelu", *dropout, *last),
        "bias_gelu_backward, no bias": (*into_gelu, None, "gelu", *dropout, *last),
        "add_norm": (wide(), wide(), row(), *norm(), *dropout, *saving),
        "add_norm, no bias": (wide(), wide(), None, *norm(), *dropout, *saving),
        "add_norm, nothing saved": (
            *(wide(hidden, False), wide(hidden, False), row(False), *norm(False), *dropout),
            *(False, implementation),
        ),
        "add_norm_backward": (grad, wide(hidden, False), *norm_scale(), *dropout, *last),
        "embeddings": (*rows, table(9), table(12), *norm(), PADDING, *dropout, False, None, PADDING, *saving),
        "embeddings_backward": (
            *into_embeddings,
            [9, 96],
            [12, 96],
            *norm_scale(),
            PADDING,
            *dropout,
            False,
            PADDING,
            *last,
        ),
        "embeddings_backward, sparse": (
            *(*into_embeddings, [9, 96], [12, 96], *norm_scale(), PADDING, *dropout, True, PADDING, *last),
        ),
        "embeddings_backward, frozen words": (
            *(*into_embeddings, None, [12, 96], *norm_scale(), PADDING, *dropout, False, PADDING, *last),
        ),
    }


CALLS = list(custom_op_calls("torch", torch.float32, 0.0, "contiguous"))


def opchecked(layout, dtype, rates):
    """`(call, implementation, dtype, p, layout)` of what `opcheck` is to be run on."""
    for call, p in itertools.product(CALLS, rates):
        op = call.split(",")[0].removesuffix("_backward")
        for implementation in serving(op, dtype):
            label = f"{call}-{implementation}-{layout}-{p}"
            yield pytest.param(call, implementation, dtype, p, layout, id=label)


@pytest.mark.parametrize(
    ("call", "implementation", "dtype", "p", "layout"),
    [
        *opchecked("contiguous", torch.float32, (0.0, 0.3)),
        *opchecked("transposed", torch.bfloat16, (0.3,)),
    ],
)
def test_opcheck(call, implementation, dtype, p, layout):
    op = getattr(torch.ops.erniem_fast, call.split(",")[0]).default
    torch.library.opcheck(op, custom_op_calls(implementation, dtype, p, layout)[call])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_ops_compile_in_one_graph(p):
    """Forward and backward of all four, and the forward without autograd, in a graph without breaks."""
    torch.compiler.reset()
    for op in flags.OPS:
        problem = problem_of(op, p=p)
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        expected = solve(problem.ours, problem.leaves, grad)
        compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
        for name, value in solve(compiled, problem.leaves, grad).items():
            assert torch.equal(value, expected[name]), (op, name)
        with torch.no_grad():
            assert torch.equal(compiled(*problem.leaves.values()), expected["result"]), op


def gelu_of(product, dropout):
    return ops.bias_gelu(product, "gelu", dropout)


def norm_of(product, dropout):
    residual = torch.linspace(-1, 1, product.x.numel()).view_as(product.x)
    return ops.add_norm(residual, product, Norm(torch.ones(97), torch.zeros(97), 1e-5), dropout)


@pytest.mark.parametrize("op", [gelu_of, norm_of])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_overwrite(op, bias, p, monkeypatch):
    """The same bits; in the input's memory where an implementation can and nothing else needs the input."""
    dropout = dropout_of(BATCHES["holes, packed"], p)
    leaf, bias = randn(TOKENS, 97, dtype=torch.float32), randn(97, dtype=torch.float32) if bias else None
    expected = op(Product(leaf, bias), dropout)
    assert torch.equal(op(Product(leaf.clone(), bias, reusable=True), dropout), expected)

    def overwritten(x):
        before = x.detach().clone()
        assert torch.equal(op(Product(x, bias, reusable=True), dropout).detach(), expected)
        return not torch.equal(x.detach(), before)

    assert not overwritten(leaf.clone().requires_grad_())
    with use_kernels(bias_gelu="native", layernorm="native"):
        assert overwritten(leaf.clone())
        monkeypatch.setenv(flags.VERIFY.name, "1")
        assert not overwritten(leaf.clone())


def test_a_norm_overwrites_nothing_of_a_narrower_dtype():
    x, residual = torch.randn(TOKENS, 97, dtype=torch.bfloat16), torch.randn(TOKENS, 97)
    before, norm = x.clone(), Norm(torch.ones(97), torch.zeros(97), 1e-5)
    with use_kernels(layernorm="native"):
        out = ops.add_norm(residual, Product(x, reusable=True), norm)
    assert out.dtype == torch.float32
    assert torch.equal(x, before)


def test_results_are_made_contiguous(monkeypatch):
    """As the fakes say they are."""
    torch_s = ops.IMPLEMENTATIONS["bias_gelu"]["torch"]

    def transposed(function):
        return lambda x, bias, activation, dropout: function(x, bias, activation, dropout).t().contiguous().t()

    monkeypatch.setitem(
        ops.IMPLEMENTATIONS["bias_gelu"], "transposed", replace(torch_s, forward=transposed(torch_s.forward))
    )
    x = randn(TOKENS, 97, dtype=torch.float32)
    with use_kernels(bias_gelu="transposed"):
        for leaf in (x, x.clone().requires_grad_()):
            out = gelu_of(Product(leaf), None)
            assert out.is_contiguous()
            assert torch.equal(out, torch.nn.functional.gelu(x))


def test_no_gradient_is_made_of_what_is_only_saved():
    """Zeros as large as what the layer norm saves would take a sixth of its backward's time."""
    batch = TokenBatch.from_cu_seqlens(torch.tensor([0, 5, 12]), 7, 12)
    problem = add_norm_problem(batch, torch.float32, 96, p=0.3)
    leaves = [leaf.requires_grad_() for leaf in problem.leaves.values()]
    out = problem.ours(*leaves)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(out, leaves, out.detach())
    assert "aten::zeros" not in {event.name for event in profile.events()}


@pytest.mark.parametrize(
    ("op", "read"),
    [("attention", set()), ("bias_gelu", {"x", "bias"}), ("add_norm", {"weight"}), ("embeddings", {"weight"})],
)
def test_only_what_a_backward_reads_may_not_change_before_it(op, read):
    """An optimizer may update all other parameters between a forward and its backward. (q, k and v are copied.)"""
    problem = problem_of(op, p=0.3)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    out = problem.ours(*leaves.values())
    expected = torch.autograd.grad(out, leaves.values(), out.detach(), retain_graph=True)
    for name, leaf in leaves.items():
        out = problem.ours(*leaves.values())
        grad = out.detach().clone()
        with torch.no_grad():
            leaf += 1
        if name in read:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out, leaves.values(), grad)
        else:
            found = torch.autograd.grad(out, leaves.values(), grad)
            assert all(map(torch.equal, found, expected))
        with torch.no_grad():
            leaf.copy_(problem.leaves[name])


class GradientOfX(NamedTuple):
    x: Tensor


class GradientOfY(NamedTuple):
    y: Tensor


def declared_forward(x: Tensor) -> Tensor:
    return x


def backward_of_a_missing_argument(grad: Tensor) -> GradientOfY:
    return GradientOfY(grad)


def backward_from_a_missing_value(grad: Tensor, z: Tensor) -> GradientOfX:
    return GradientOfX(grad)


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (backward_of_a_missing_argument, r"backward names \['y'\], which"),
        (backward_from_a_missing_value, r"backward names \['z'\], which its forward neither takes nor returns"),
    ],
)
def test_a_declaration_that_does_not_fit_together(backward, message):
    with pytest.raises(TypeError, match=message):
        Op("attention", declared_forward, backward, {})
