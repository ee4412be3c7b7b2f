"""The Triton kernels of bias_gelu against the reference."""

from functools import partial

import pytest
import torch

from erniem_fast import ops, reference
from erniem_fast.dropout import dropout_mask
from erniem_fast.flags import use_kernels
from erniem_fast.ops import Product
from tests.batches import dropout_of, two_sequences
from tests.kernels.comparison import DEVICE, SEED, assert_equivalent, run

# The sigmoid of a large negative number: exp overflows to infinity, whose reciprocal is the zero that is wanted.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


def inputs_of(tokens, features, dtype):
    return [(2 * torch.randn(shape, device=DEVICE)).to(dtype) for shape in ((tokens, features), (features,))]


def kernel(activation, batch, p, seed, x, bias=None):
    with use_kernels(bias_gelu="triton"):
        return ops.bias_gelu(Product(x, bias), activation, dropout_of(batch, p, seed))


def oracle(activation, batch, p, seed, x, bias=None):
    return reference.bias_gelu(x, bias, activation, dropout_of(batch, p, seed))


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(
    ("tokens", "features"), [(1, 384), (3, 1000), (150, 96), (37, 768), (5, 7), (90, 3), (90, 2), (90, 1)]
)
def test_equivalent_to_the_reference(tokens, features, activation, dtype, seed):
    torch.manual_seed(tokens + features)
    case = (activation, two_sequences(tokens, DEVICE), 0.1, seed)
    assert_equivalent(partial(kernel, *case), partial(oracle, *case), inputs_of(tokens, features, dtype))


def test_without_a_bias():
    case = ("gelu", two_sequences(21, DEVICE), 0.1, SEED)
    assert_equivalent(partial(kernel, *case), partial(oracle, *case), inputs_of(21, 384, torch.float32)[:1])


def test_bias_in_float32_as_under_autocast():
    case = ("gelu", two_sequences(21, DEVICE), 0.1, SEED)
    (x, _), (_, bias) = inputs_of(21, 384, torch.bfloat16), inputs_of(21, 384, torch.float32)

    def rounded(*inputs):
        return oracle(*case, *inputs).to(inputs[0].dtype)

    assert_equivalent(partial(kernel, *case), rounded, (x, bias))


def test_no_tokens():
    results = run(partial(kernel, "gelu", two_sequences(0, DEVICE), 0.1, SEED), inputs_of(0, 384, torch.float32))
    assert [each.shape for each in results] == [(0, 384), (0, 384), (384,)]
    assert torch.equal(results[2], torch.zeros_like(results[2]))


def test_inputs_that_are_not_contiguous():
    x, bias = inputs_of(6, 384, torch.float32)
    case = partial(kernel, "gelu", two_sequences(6, DEVICE), 0.1, SEED)
    strided, dense = run(case, (x.t().contiguous().t(), bias)), run(case, (x, bias))
    assert all(torch.equal(left, right) for left, right in zip(strided, dense, strict=True))


@pytest.mark.parametrize("features", [1, 2, 3, 20, 100, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_draws_the_bits_of_the_reference(features, dtype):
    """Over tiles of 4 to 256 features; a kept element and its gradient are scaled by 1 / (1 - p), exactly."""
    batch = two_sequences(200, DEVICE)
    x = torch.full((200, features), 3.0, dtype=dtype, device=DEVICE)
    out, grad_x = run(partial(kernel, "relu", batch, 0.5, SEED), [x])
    mask = dropout_mask(SEED, 0.5, features, batch.columns, batch.sequences.sequence_ids).to(dtype)
    assert 0.4 < mask.mean() < 0.6
    assert torch.equal(out, mask * 6)
    assert torch.equal(grad_x, mask * 2)


def test_the_gelu_is_exact():
    """The tanh approximation is off by 4.7e-4 somewhere on this range."""
    x = torch.linspace(-6, 6, 1024, device=DEVICE).view(1, -1)
    out, grad_x = run(partial(kernel, "gelu", two_sequences(1, DEVICE), 0.0, None), [x])
    exact, exact_grad_x = run(partial(oracle, "gelu", two_sequences(1, DEVICE), 0.0, None), [x.double()])
    assert (out - exact).abs().max() < 1e-6
    assert (grad_x - exact_grad_x).abs().max() < 1e-6


def test_backward_is_deterministic():
    case = partial(kernel, "gelu", two_sequences(150, DEVICE), 0.1, SEED)
    inputs = inputs_of(150, 96, torch.float32)
    assert all(torch.equal(left, right) for left, right in zip(run(case, inputs), run(case, inputs), strict=True))
