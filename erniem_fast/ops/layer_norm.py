"""The layer norm inside `embeddings` and `add_norm`: by Triton kernels, by PyTorch, and by the reference.

Only its input `z` is saved for the backward, which reads whole rows anyway and computes their statistics again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..reference import Norm, NormScale, wide


@dataclass(frozen=True)
class LayerNorm:
    """One way to compute a layer norm.

    Attributes:
        forward: takes `(z, norm)` and returns the normalised rows, in the dtype of z.
        backward: takes `(grad, z, norm)` and returns the gradients of z, in its dtype, and of weight and bias, in at
            least `wide(z.dtype)`.
    """

    forward: Callable[[Tensor, Norm], Tensor]
    backward: Callable[[Tensor, Tensor, NormScale], tuple[Tensor, ...]]


def with_bias(norm: Norm) -> Norm:
    """The norm, with zeros for a missing bias, because every implementation adds one."""
    return norm if norm.bias is not None else norm._replace(bias=torch.zeros_like(norm.weight))


def _forward_torch(z: Tensor, norm: Norm) -> Tensor:
    x = _centred(z)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, norm.eps)[0].to(z.dtype)


def _backward_torch(grad: Tensor, z: Tensor, norm: NormScale) -> tuple[Tensor, ...]:
    x = _centred(z)
    grad, weight = grad.to(x.dtype), norm.weight.to(x.dtype)
    normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, norm.eps)
    # The normalised rows stand in for x: PyTorch's kernel adds up terms that cancel, and a mean makes them large.
    grad_normal, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, normal, x.shape[-1:], torch.zeros_like(mean), torch.ones_like(rstd), weight, None, [True, False, False]
    )
    # On a CPU that kernel also adds up the tokens one after another, which is less exact than `sum`.
    return (grad_normal * rstd).to(z.dtype), (grad * normal).sum(0), grad.sum(0)


def _centred(z: Tensor) -> Tensor:
    """Rows minus their mean. PyTorch's kernel subtracts it once more; `reference.normalise` says why that helps."""
    x = z.to(wide(z.dtype))
    return x - x.mean(-1, keepdim=True)


def _forward_reference(z: Tensor, norm: Norm) -> Tensor:
    return reference.layer_norm(z, norm).to(z.dtype)


def _backward_reference(grad: Tensor, z: Tensor, norm: NormScale) -> tuple[Tensor, ...]:
    grad, x, weight = (each.to(wide(z.dtype)) for each in (grad, z, norm.weight))
    grads = reference.layer_norm_backward(grad, x, weight, norm.eps)
    return grads[0].to(z.dtype), *grads[1:]


def _forward_triton(z: Tensor, norm: Norm) -> Tensor:
    from ..kernels import add_norm

    return add_norm.forward(z, None, None, norm, None, save=False)[0]


def _backward_triton(grad: Tensor, z: Tensor, norm: NormScale) -> tuple[Tensor, ...]:
    from ..kernels import add_norm

    grad_z, _, _, grad_weight, grad_bias = add_norm.backward(grad, z, norm, None)
    return grad_z, grad_weight, grad_bias


TRITON = LayerNorm(_forward_triton, _backward_triton)
TORCH = LayerNorm(_forward_torch, _backward_torch)
REFERENCE = LayerNorm(_forward_reference, _backward_reference)
