"""`add_norm`: LN(residual + dropout(x + bias)), which ends each half of a layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import Dropout, drop_features
from ..native import add_norm as native_add_norm
from ..reference import Norm, NormScale, wide
from .choose import Implementation, choose
from .layer_norm import REFERENCE, TORCH, LayerNorm, with_bias
from .native import native_implementation
from .op import Op
from .product import Product
from .triton import triton_implementation


def add_norm(residual: Tensor, product: Product, norm: Norm, dropout: Dropout | None = None) -> Tensor:
    """LN(residual + dropout(x + bias)), where LN is layer normalisation (Ba et al., arXiv 1607.06450).

    Args:
        residual: `(tokens, hidden)`, floating point.
        product: x, `(tokens, hidden)`, floating point, and its bias, `(hidden,)` or None.
        norm: the parameters of LN.
        dropout: the dropout of x + bias; None for no dropout.

    Returns:
        `(tokens, hidden)` in the dtype that `residual` and x promote to.

    Raises:
        ValueError: a flag has a value that it does not take.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype; or, with
            `ERNIEM_FAST_VERIFY=1`, the result differs from the reference's.
    """
    x, bias, reusable = product
    implementation = choose("add_norm", x.device, x.dtype)
    return _OP(implementation, residual, x, bias, with_bias(norm), dropout, overwrite=reusable)


class _Results(NamedTuple):
    out: Tensor
    z: Tensor  # the layer norm's input


class _Gradients(NamedTuple):
    residual: Tensor
    x: Tensor  # empty without dropout, when it equals the gradient of the residual
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def _forward(residual: Tensor, x: Tensor, bias: Tensor | None, norm: Norm, dropout: Dropout | None) -> _Results:
    out = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, x.dtype))
    return _Results(out, out.new_empty(out.shape))


def _backward(grad: Tensor, z: Tensor, norm: NormScale, dropout: Dropout | None) -> _Gradients:
    grad_x = z.new_empty(0) if dropout is None else z.new_empty(z.shape)
    vectors = (norm.weight.new_empty(norm.weight.shape, dtype=wide(z.dtype)) for _ in range(3))
    return _Gradients(z.new_empty(z.shape), grad_x, *vectors)


def _finish(grads: _Gradients, dropout: Dropout | None) -> _Gradients:
    return grads._replace(x=grads.residual) if dropout is None else grads


def _composed(layer_norm: LayerNorm) -> Implementation:
    def forward(residual, x, bias, norm, dropout):
        dtype = torch.promote_types(residual.dtype, x.dtype)
        z = (residual + drop_features(x if bias is None else x + bias, dropout)).to(dtype)
        return layer_norm.forward(z, norm), z

    def backward(grad, z, norm, dropout):
        grad_z, *grads_of_norm = layer_norm.backward(grad, z, norm)
        grad_x = drop_features(grad_z, dropout)
        grad_bias = grad_x.sum(0, dtype=wide(z.dtype))
        return grad_z, z.new_empty(0) if dropout is None else grad_x, grad_bias, *grads_of_norm

    return Implementation(forward, backward)


_OP = Op(
    "add_norm",
    _forward,
    _backward,
    {
        "triton": triton_implementation("add_norm"),
        "native": native_implementation(native_add_norm, devices=("cpu",)),
        "torch": _composed(TORCH),
        "reference": _composed(REFERENCE),
    },
    _finish,
)
