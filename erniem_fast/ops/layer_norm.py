"""The layer norm inside `embeddings` and `add_layernorm`: by Triton's, by PyTorch's kernels, and by the reference.

Only its input `z` is saved for the backward, which reads all of a row anyway and gets the row's statistics from it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..reference import wide


@dataclass(frozen=True)
class LayerNorm:
    """One way to compute a layer norm.

    Attributes:
        forward: `(z, weight, norm_bias, eps)` to the normalised rows, in the dtype of z.
        backward: `(grad, z, weight, eps)` to the gradients of z, weight and norm_bias, in `wide(z.dtype)` at least.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]


def bias_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias of a layer norm, zeros where it has none: no implementation does without."""
    return torch.zeros_like(weight) if bias is None else bias


def _forward_torch(z: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    x = _centred(z)
    return torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), norm_bias.to(x.dtype), eps)[0].to(z.dtype)


def _backward_torch(grad: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    x = _centred(z)
    grad, weight = grad.to(x.dtype), weight.to(x.dtype)
    normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    # As if of normalised rows: the native kernel adds up terms that cancel, of which the mean makes large ones.
    of_normal, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, normal, x.shape[-1:], torch.zeros_like(mean), torch.ones_like(rstd), weight, None, [True, False, False]
    )
    # It also sums over tokens one after another on CPU, and less exactly than `sum` does.
    return (of_normal * rstd).to(z.dtype), (grad * normal).sum(0), grad.sum(0)


def _centred(z: Tensor) -> Tensor:
    """Rows less their mean. The native kernel takes it off once more, which `reference.normalise` says the use of."""
    x = z.to(wide(z.dtype))
    return x - x.mean(-1, keepdim=True)


def _forward_reference(z: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    return reference.layer_norm(z, weight, norm_bias, eps).to(z.dtype)


def _backward_reference(grad: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    grads = reference.layer_norm_backward(grad.to(wide(z.dtype)), z.to(wide(z.dtype)), weight.to(wide(z.dtype)), eps)
    return grads[0].to(z.dtype), *grads[1:]


def _forward_triton(z: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    from ..kernels import layernorm

    return layernorm.forward(z, None, None, weight, norm_bias, eps, None, None, 0.0, None, save=False)[0]


def _backward_triton(grad: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    from ..kernels import layernorm

    of_z, _, _, of_weight, of_norm_bias = layernorm.backward(grad, z, weight, eps, None, None, 0.0, None)
    return of_z, of_weight, of_norm_bias


TRITON = LayerNorm(_forward_triton, _backward_triton)
TORCH = LayerNorm(_forward_torch, _backward_torch)
REFERENCE = LayerNorm(_forward_reference, _backward_reference)
