"""The libraries that can compute x Wᵀ + b in float32 on the CPU.

Both gradients of a linear are such products too, of transposed operands: g W, and gᵀ x.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modes import has_onednn, has_onednn_packing, onednn_linear, onednn_pack
from ..native import library, packed
from ..native.linear import forward as native_linear

TORCH, ONEDNN, NATIVE = "torch", "onednn", "native"
# With weights that only modules of `inference` hold, in float32 and in bfloat16.
ONEDNN_PACKED, NATIVE_PACKED = "onednn-packed", "native-packed"
ONEDNN_BFLOAT16, NATIVE_BFLOAT16 = "onednn-bfloat16", "native-bfloat16"

# Takes x `(tokens, in_features)`, a weight `(out_features, in_features)`, both with any strides, a bias or None, and
# memory for the result, whose rows may be apart, or None to allocate it. Returns the result.
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    product = onednn_linear(x, weight, bias)
    return product if out is None else out.copy_(product)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    native_linear(out, x, weight, bias)
    return out


LIBRARIES: dict[str, Linear] = {TORCH: torch_linear, ONEDNN: _onednn, NATIVE: _native}


def _onednn_opaque(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    return onednn_linear(x, weight, bias)


def _onednn_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    return onednn_linear(x.bfloat16(), weight, bias).float()


def _native_packed(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    return packed.linear(x, weight, None, bias, torch.float32, out)


def _native_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    return packed.linear(x, weight, None, bias, torch.bfloat16, out)


# What packs a weight `(out_features, in_features)`, and the product with it.
PACKED: dict[str, tuple[Callable[[Tensor], Tensor], Linear]] = {
    ONEDNN_PACKED: (onednn_pack, _onednn_opaque),
    NATIVE_PACKED: (packed.pack, _native_packed),
    ONEDNN_BFLOAT16: (lambda weight: onednn_pack(weight.bfloat16()), _onednn_bfloat16),
    NATIVE_BFLOAT16: (lambda weight: packed.pack(weight.bfloat16()), _native_bfloat16),
}


def available() -> tuple[str, ...]:
    """The names of the libraries that this process can use."""
    present = {TORCH: True, ONEDNN: has_onednn(), NATIVE: library.is_built("cpu")}
    return tuple(name for name in LIBRARIES if present[name])


def available_packed(dtype: torch.dtype) -> tuple[str, ...]:
    """The names of those with packed weights in a dtype, float32 or bfloat16, that this process can use."""
    names = (ONEDNN_PACKED, NATIVE_PACKED) if dtype == torch.float32 else (ONEDNN_BFLOAT16, NATIVE_BFLOAT16)
    return tuple(
        name for name, present in zip(names, (has_onednn_packing(), packed.multiplies(dtype)), strict=True) if present
    )
