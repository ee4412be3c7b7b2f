"""8-bit numbers for matrix products on GPUs: rounding of rows, and results from the products, by Triton or in PyTorch.

They are no ops with a flag: only inference uses them, and nothing follows them. What switches kernels off
(`ERNIEM_FAST_KERNELS=off`) or verifies them (`ERNIEM_FAST_VERIFY=1`) leaves them to the reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import flags, reference
from .triton import on_gpu, refuses_16_bits, triton_function

_KERNELS = {name: triton_function("quantise", name) for name in ("quantise", "dequantise")}


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.quantise`."""
    return _function("quantise", x.device)(x=x.contiguous(), dtype=dtype)


def dequantise(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantise`."""
    function = _function("dequantise", sums.device)
    return function(sums=sums, scale=scale, weight_scale=weight_scale, bias=bias, dtype=dtype)


@flags.while_held
def _function(name: str, device: torch.device) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    allowed = flags.read(flags.KERNELS) == "auto" and flags.read(flags.VERIFY) == "0"
    return (
        _KERNELS[name] if allowed and on_gpu(device) and refuses_16_bits(device) is None else getattr(reference, name)
    )
