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
    return torch.native_layer_norm(z, z.shape[-1:], _native(weight, z), _native(norm_bias, z), eps)[0]


def _backward_torch(grad: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    weight = _native(weight, z)
    _, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight, weight, eps)
    of_z, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad.to(z.dtype), z, z.shape[-1:], mean, rstd, weight, weight, [True, False, False]
    )
    # The native kernel sums over tokens one after another on CPU, and less exactly than `sum` does.
    grad = grad.to(wide(z.dtype))
    return of_z, (grad * (z - mean) * rstd).sum(0), grad.sum(0)


def _native(weight: Tensor, z: Tensor) -> Tensor:
    """The weight's dtype with which the native kernel takes wide statistics: on CPU they follow the weight's."""
    return weight.to(wide(z.dtype)) if z.device.type == "cpu" else weight.to(z.dtype)


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
