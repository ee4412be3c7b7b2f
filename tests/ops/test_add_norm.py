"""The residual's sum and its layer norm, by every implementation that a CPU runs."""

import pytest
import torch
import torch.nn.functional as F

from erniem_fast import ops, use_kernels
from erniem_fast.ops import Product
from erniem_fast.reference import Norm
from tests.batches import dropout_of, sequences
from tests.ops.problems import BATCHES, EPS, add_norm_problem, assert_rule_one, each_implementation, largest, serving


@each_implementation("add_norm")
@pytest.mark.parametrize(
    ("batch", "hidden", "p", "bias"),
    [
        ("short", 96, 0.0, False),
        ("short", 384, 0.1, True),
        ("around 64", 768, 0.0, True),
        ("around 64", 768, 0.5, False),
        ("unequal", 1024, 0.1, True),
        ("holes, packed", 97, 0.3, True),
        ("holes, padded", 33, 0.3, True),
        ("no tokens", 96, 0.1, True),
        ("no tokens", 96, 0.0, False),
    ],
)
def test_add_norm(implementation, dtype, batch, hidden, p, bias):
    with use_kernels(layernorm=implementation):
        assert_rule_one(add_norm_problem(BATCHES[batch], dtype, hidden, p, dtype if bias else None))


@each_implementation("add_norm")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_add_norm_of_mixed_dtypes(implementation, dtype, p, bias):
    """As under autocast: the residual stream and the parameters in float32, a matrix product in the lower dtype."""
    with use_kernels(layernorm=implementation):
        assert_rule_one(
            add_norm_problem(BATCHES["around 64"], dtype, 768, p, bias, residual=torch.float32, norm=torch.float32)
        )


@each_implementation("add_norm")
@pytest.mark.parametrize("norm", [torch.float32, torch.bfloat16])
def test_add_norm_with_weights_of_another_dtype(implementation, dtype, norm):
    """The result's dtype follows residual and x alone."""
    with use_kernels(layernorm=implementation):
        assert_rule_one(add_norm_problem(BATCHES["short"], dtype, 384, 0.1, dtype, norm=norm))


@pytest.mark.parametrize("implementation", serving("add_norm", torch.float16, interpreted=True))
def test_add_norm_of_large_float16(implementation):
    """Squares of values beyond 256 overflow float16; statistics must be taken in float32."""
    x = torch.randn(17, 384).mul(500.0).half()
    norm = Norm(torch.ones(384).half(), torch.zeros(384).half(), EPS)
    with use_kernels(layernorm=implementation):
        out = ops.add_norm(x, Product(torch.zeros_like(x)), norm)
    exact = F.layer_norm(x.double(), (384,), eps=EPS)
    assert largest(out - exact) <= torch.finfo(torch.float16).eps * largest(exact)


@each_implementation("add_norm", interpreted=True)
@pytest.mark.parametrize("hidden", [97, 768])
@pytest.mark.parametrize("mean", [0.0, 1_000.0, 1e6])
def test_add_norm_of_equal_and_shifted_values(implementation, dtype, hidden, mean):
    """A mean that is off by a unit in its last place must not be seen over a standard deviation of 1, or of sqrt(eps).

    Equal values come out as zeros, as `F.layer_norm` has them.
    """
    x = (torch.randn(16, hidden) + min(mean, 6e4 if dtype == torch.float16 else mean)).to(dtype)
    x[3:8] = x[3:8, :1]
    x.requires_grad_()
    norm = Norm(torch.ones(hidden), torch.zeros(hidden), EPS)
    with use_kernels(layernorm=implementation):
        out = ops.add_norm(x, Product(torch.zeros(16, hidden)), norm)
    assert largest(out[3:8]) == 0.0
    doubled = x.detach().double().requires_grad_()
    exact = F.layer_norm(doubled, (hidden,), eps=EPS)
    assert largest(out - exact) <= 4 * 2.0**-23 * largest(exact)
    grad = torch.randn_like(out)
    (grad_x,), (grad_doubled,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(exact, doubled, grad.double())
    assert largest(grad_x - grad_doubled) <= 4 * torch.finfo(dtype).eps * largest(grad_doubled)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_residual_and_x_do_not_share_memory(p):
    """Without dropout they are equal; an optimizer or a clipping that writes to one must not change the other."""
    residual, x = (torch.randn(8, 96, requires_grad=True) for _ in range(2))
    norm = Norm(torch.ones(96), torch.zeros(96), EPS)
    out = ops.add_norm(residual, Product(x), norm, dropout_of(sequences(8), p))
    out.backward(torch.randn_like(out))
    before = x.grad.clone()
    residual.grad.zero_()
    assert torch.equal(x.grad, before)


def test_residual_and_x_may_be_one_tensor():
    x = torch.randn(8, 96, dtype=torch.float64, requires_grad=True)
    weight, norm_bias = torch.rand(96).double(), torch.randn(96).double()
    ours = ops.add_norm(x, Product(x), Norm(weight, norm_bias, EPS))
    grad = torch.randn_like(ours)
    expected = F.layer_norm(2 * x, (96,), weight, norm_bias, EPS)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=0, atol=1e-12
    )
