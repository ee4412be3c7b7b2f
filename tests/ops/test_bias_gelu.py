"""Bias, activation and dropout, by every implementation that a CPU runs."""

import pytest
import torch

from erniem_fast import ops, reference, use_kernels
from erniem_fast.ops import Product
from tests.ops.problems import BATCHES, assert_rule_one, bias_gelu_problem, each_implementation, serving


@each_implementation("bias_gelu")
@pytest.mark.parametrize(
    ("batch", "hidden", "activation", "p", "bias"),
    [
        ("short", 96, "gelu", 0.0, None),
        ("short", 384, "gelu", 0.1, "same"),
        ("around 64", 3072, "gelu", 0.0, "same"),
        ("unequal", 768, "gelu", 0.3, None),
        ("holes, packed", 1024, "gelu", 0.1, "float32"),
        ("holes, padded", 97, "gelu", 0.1, "same"),
        ("holes, packed", 96, "gelu_tanh", 0.1, "same"),
        ("short", 384, "gelu_tanh", 0.0, None),
        ("short", 384, "relu", 0.1, "same"),
        ("no tokens", 96, "gelu", 0.1, "same"),
        ("no tokens", 96, "gelu", 0.0, None),
    ],
)
def test_bias_gelu(implementation, dtype, batch, hidden, activation, p, bias):
    bias = {"same": dtype, "float32": torch.float32}.get(bias)
    with use_kernels(bias_gelu=implementation):
        assert_rule_one(bias_gelu_problem(BATCHES[batch], dtype, hidden, activation, p, bias))


@pytest.mark.parametrize("implementation", serving("bias_gelu", torch.float16, interpreted=True))
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_of_large_values(implementation, activation):
    x = torch.tensor([[-6e4, -1e3, -300.0, -30.0, 0.0, 30.0, 300.0, 1e3, 6e4]]).half().requires_grad_()
    with use_kernels(bias_gelu=implementation):
        out = ops.bias_gelu(Product(x), activation)
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x.relu())
    assert grad_x[x != 0].tolist() == [0.0] * 4 + [1.0] * 4


# Of every size, from the smallest number to the largest, and those on which results depend most.
SIZES = 2.0 ** torch.arange(-149, 127)[:, None]
NUMBERS = torch.cat([(SIZES * torch.linspace(1, 2, 17)).flatten(), torch.linspace(0, 14, 20_000)])

# PyTorch's own gives NaN for infinity, and below 0 is off by 1e-6.
exact_implementations = pytest.mark.parametrize(
    "implementation", [name for name in serving("bias_gelu", interpreted=True) if name != "torch"]
)


@exact_implementations
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
def test_the_gelu_of_numbers_of_every_size(implementation):
    """Off by at most two units in the last place of the result and one of 1, and its slope by two of 1."""
    x = torch.stack([NUMBERS, -NUMBERS]).requires_grad_()
    with use_kernels(bias_gelu=implementation):
        out = ops.bias_gelu(Product(x), "gelu")
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = reference.activate(exact_x, "gelu")
    (exact_grad_x,) = torch.autograd.grad(exact.sum(), exact_x)
    unit = torch.finfo(torch.float32).eps
    assert ((out - exact).abs() <= 2 * unit * exact.abs() + unit).all()
    assert ((grad_x - exact_grad_x).abs() <= 2 * unit).all()


@exact_implementations
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_the_gelu_of_what_is_no_number(implementation):
    """As by the definition: x times the probability below x, which is 0 at minus infinity."""
    with use_kernels(bias_gelu=implementation):
        out = ops.bias_gelu(Product(torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -0.0]])), "gelu")
    assert out[0, 0] == torch.inf
    assert out[0, 1:3].isnan().all()
    assert out[0, 3:].tolist() == [0.0, 0.0]
