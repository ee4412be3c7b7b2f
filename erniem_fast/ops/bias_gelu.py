"""`bias_gelu`: dropout(activation(x + bias)), the middle of a layer's second half."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dropout import Dropout, drop_features
from ..native import bias_gelu as native_bias_gelu
from ..reference import wide
from .choose import Implementation, choose
from .native import native_implementation
from .op import Op
from .product import Product
from .triton import triton_implementation

# The op's name for each activation of transformers that it can compute; ERNIE-M uses the exact GELU.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def bias_gelu(product: Product, activation: str, dropout: Dropout | None = None) -> Tensor:
    """dropout(activation(x + bias)).

    Args:
        product: x, `(tokens, intermediate)`, floating point, and its bias, `(intermediate,)` or None.
        activation: a value of `ACTIVATIONS`: `gelu` (exact, Hendrycks & Gimpel, arXiv 1606.08415), `gelu_tanh`
            (its approximation) or `relu`.
        dropout: the dropout of the result; None for no dropout.

    Returns:
        `(tokens, intermediate)` in the dtype of x.

    Raises:
        ValueError: a flag has a value that it does not take.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype; or, with
            `ERNIEM_FAST_VERIFY=1`, the result differs from the reference's.
    """
    x, bias, reusable = product
    implementation = choose("bias_gelu", x.device, x.dtype)
    return _OP(implementation, x, bias, activation, dropout, overwrite=reusable)


class _Gradients(NamedTuple):
    x: Tensor
    bias: Tensor  # empty if there is no bias


def _forward(x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None) -> _Gradients:
    return _Gradients(x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[1], dtype=wide(x.dtype)))


def _activate_torch(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward_torch(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _composed(activate: Callable[..., Tensor], activate_backward: Callable[..., Tensor]) -> Implementation:
    def forward(x, bias, activation, dropout):
        x = x if bias is None else x + bias.to(x.dtype)
        return drop_features(activate(x, activation), dropout)

    def backward(grad, x, bias, activation, dropout):
        biased = x if bias is None else x + bias.to(x.dtype)
        grad_x = activate_backward(drop_features(grad, dropout), biased, activation)
        return grad_x, (grad_x[:, :0] if bias is None else grad_x).sum(0, dtype=wide(x.dtype))

    return Implementation(forward, backward)


_OP = Op(
    "bias_gelu",
    _forward,
    _backward,
    {
        "triton": triton_implementation("bias_gelu"),
        "native": native_implementation(native_bias_gelu, devices=("cpu",)),
        "torch": _composed(_activate_torch, _activate_backward_torch),
        "reference": _composed(reference.activate, reference.activate_backward),
    },
)
