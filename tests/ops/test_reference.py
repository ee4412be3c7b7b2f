"""The reference itself, against PyTorch and the definitions."""

import pytest
import torch
import torch.nn.functional as F

from erniem_fast import reference
from erniem_fast.dropout import dropout_mask
from erniem_fast.reference import Norm
from tests.batches import SEED, dropout_of
from tests.ops.problems import BATCHES, EPS, PADDING, add_norm_problem, naive_attention


def test_reference_layer_norm():
    x, weight, norm_bias = torch.randn(9, 97).double(), torch.rand(97).double(), torch.randn(97).double()
    expected = F.layer_norm(x, (97,), weight, norm_bias, EPS)
    torch.testing.assert_close(reference.layer_norm(x, Norm(weight, norm_bias, EPS)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_reference_activations(activation):
    x = torch.linspace(-9, 9, 4_001, dtype=torch.float64, requires_grad=True)
    expected = {
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "relu": lambda: torch.relu(x),
    }[activation]()
    torch.testing.assert_close(reference.activate(x, activation), expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(x)
    (grad_x,) = torch.autograd.grad(expected, x, grad)
    computed = reference.activate_backward(grad, x.detach(), activation)
    torch.testing.assert_close(computed, grad_x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", ["short", "holes, packed", "holes, padded", "biases and ranges", "no tokens"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attention(batch, p):
    batch = BATCHES[batch]
    qkv = torch.randn(batch.tokens, 3 * 2 * 5, dtype=torch.float64)
    ours = reference.attention(qkv, batch.sequences, 2, 0.4, dropout_of(batch, p))
    torch.testing.assert_close(ours, naive_attention(qkv, batch, 2, 0.4, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", ["short", "holes, packed", "holes, padded", "unequal", "ranges", "no tokens"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attention_backward(batch, p):
    batch = BATCHES[batch]
    where = (batch.sequences, 2, 0.4, dropout_of(batch, p))
    qkv = torch.randn(batch.tokens, 3 * 2 * 8, dtype=torch.float64, requires_grad=True)
    out = reference.attention(qkv, *where)
    grad = torch.randn_like(out)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    assert bool(grad_qkv.isfinite().all())
    torch.testing.assert_close(reference.attention_backward(grad, qkv.detach(), *where), grad_qkv, rtol=0, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attend_backward(biased, p):
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = None
    if biased:
        bias = torch.randn(2, 1, 1, 7).masked_fill(torch.rand(7) < 0.4, -torch.inf)
        bias[1] = -torch.inf
    masks = (bias, torch.rand(2, 3, 7, 7) >= p if p else None, p)
    out, probabilities = reference.attend(query, key, value, 0.3, *masks)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (query, key, value), grad)
    computed = reference.attend_backward(grad, query.detach(), key.detach(), value.detach(), 0.3, *masks)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(out, probabilities @ value, rtol=0, atol=1e-12)


def test_reference_layer_norm_backward():
    leaves = [torch.randn(9, 97).double(), torch.rand(97).double(), torch.randn(97).double()]
    x, weight, norm_bias = (leaf.requires_grad_() for leaf in leaves)
    out = reference.layer_norm(x, Norm(weight, norm_bias, EPS))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    computed = reference.layer_norm_backward(grad, x.detach(), weight.detach(), EPS)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_reference_add_norm_and_embeddings():
    batch, hidden = BATCHES["holes, packed"], 96
    dropout = dropout_of(batch, 0.3)
    mask = dropout_mask(SEED, 0.3, hidden, dropout.columns, dropout.sequence_ids).double() / 0.7
    problem = add_norm_problem(batch, torch.float64, hidden, 0.3, bias=torch.float64)
    residual, x, weight, norm_bias, bias = problem.leaves.values()
    expected = F.layer_norm(residual + mask * (x + bias), (hidden,), weight, norm_bias, EPS)
    torch.testing.assert_close(problem.oracle(*problem.leaves.values()), expected, rtol=0, atol=1e-12)
    ids, tables = torch.randint(0, 12, (2, batch.tokens)), torch.randn(2, 12, hidden).double()
    ours = reference.embeddings(*ids, *tables, Norm(weight, norm_bias, EPS), PADDING, dropout)
    expected = mask * F.layer_norm(tables[0][ids[0]] + tables[1][ids[1]], (hidden,), weight, norm_bias, EPS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_softmax_of_nothing_is_zero(dtype):
    scores = torch.tensor([[-torch.inf] * 3, [0.0, -torch.inf, 0.0]], dtype=dtype, requires_grad=True)
    probabilities = reference.softmax(scores)
    assert probabilities.tolist() == [[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    probabilities.backward(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], dtype=dtype))
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0], [-0.5, 0.0, 0.5]]


def test_quantised_tokens_are_within_half_a_level():
    x = torch.cat([torch.randn(20, 33), torch.rand(5, 33) + 7, -torch.rand(5, 33)])
    for levels in (127, 255):
        values, zero, scale = reference.quantise_tokens(x, levels)
        assert values.min() == 0
        assert values.max() == levels
        # Besides x, the integer for 0 is rounded: at the ends of the range both can add up, and are then cut off.
        assert ((values - zero) * scale - x).abs().le(scale * 1.001 * (0.5 + (values == levels) * 0.5)).all()
        assert torch.equal(values[x == 0], zero.expand_as(values)[x == 0])


def test_rows_that_have_no_levels():
    inf, largest = torch.inf, torch.finfo(torch.float32).max
    x = torch.tensor(
        [[0.0, 0, 0], [1e-40, 0, -1e-41], [1, 2, torch.nan], [1, inf, 0], [-inf, 1, inf], [largest, -1e38, 0]]
    )
    values, zero, scale = reference.quantise_tokens(x, 255)
    assert not values.any()
    assert not zero.any()
    torch.testing.assert_close(
        scale[:, 0], torch.tensor([0.0, 0, torch.nan, torch.nan, torch.nan, torch.nan]), equal_nan=True
    )
    values, scale = reference.quantise_weight(x)
    assert not values[:5].any()
    assert torch.equal(scale.isnan(), torch.tensor([False, False, True, True, True, False]))
    assert values[5].tolist() == [127, -37, 0]


def test_quantised_linear_by_integers():
    """A grid that both roundings leave as it is: the result is exact."""
    x = torch.tensor([[255.0, 0, 3], [200, -55, 17], [0, 0, 0], [-255, -1, -254]])
    weight = torch.tensor([[127.0, -3, 0], [0, 0, 0], [1, 127, -126]]) * torch.tensor([[0.5], [1], [2]])
    values, scale = reference.quantise_weight(weight)
    assert scale.tolist() == [0.5, 0.0, 2.0]
    bias = torch.tensor([1.0, 2, 3])
    assert torch.equal(reference.quantised_linear(x, values, scale, bias), F.linear(x, weight, bias))
    assert torch.equal(reference.quantised_linear(x, values, scale, None), F.linear(x, weight))
    assert reference.quantised_linear(x[:0], values, scale, bias).shape == (0, 3)


def test_quantised_linear_is_close():
    x, weight, bias = torch.randn(40, 96), torch.randn(50, 96), torch.randn(50)
    values, scale = reference.quantise_weight(weight)
    result = reference.quantised_linear(x, values, scale, bias)
    # An element is off by at most a level, a weight by half of one, whose products with the other factor add up.
    x_error, weight_error = (x.aminmax(dim=1).max - x.aminmax(dim=1).min)[:, None] / 255, scale / 2
    bound = x_error * weight.abs().sum(1) + weight_error * (x.abs().sum(1, keepdim=True) + 96 * x_error)
    error = (result - F.linear(x.double(), weight.double(), bias.double())).abs()
    assert (error <= bound).all()
    assert error.mean() < 0.05 * bound.mean()  # most of it cancels
