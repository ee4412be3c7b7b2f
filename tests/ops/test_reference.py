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


@pytest.mark.parametrize("batch", ["short", "holes, packed", "holes, padded", "no tokens"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attention(batch, p):
    batch = BATCHES[batch]
    qkv = torch.randn(batch.tokens, 3 * 2 * 5, dtype=torch.float64)
    ours = reference.attention(qkv, batch.sequences, 2, 0.4, dropout_of(batch, p))
    torch.testing.assert_close(ours, naive_attention(qkv, batch, 2, 0.4, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", ["short", "holes, packed", "holes, padded", "unequal", "no tokens"])
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


@pytest.mark.parametrize("masked_keys", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attend_backward(masked_keys, p):
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    key_mask = None
    if masked_keys:
        key_mask = torch.rand(2, 1, 1, 7) < 0.6
        key_mask[1] = False
    masks = (key_mask, torch.rand(2, 3, 7, 7) >= p if p else None, p)
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
