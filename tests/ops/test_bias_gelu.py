"""Bias, activation and dropout, by every implementation that a CPU runs."""

import pytest
import torch

from erniem_fast import ops, use_kernels
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
