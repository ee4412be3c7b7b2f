"""The matrix product x Wᵀ + b by 8-bit integers, on the CPU: the bits of `reference.quantised_linear`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .function import FLOAT, Function

# The numbers of `Int8Kernel` in csrc/int8_tile.h, the best last.
KERNELS = {"plain": 0, "avx2": 1, "avx512": 2, "avx_vnni": 3, "avx512_vnni": 4}

# The sizes of a block of a packed weight, as in csrc/int8_tile.h.
_COLUMNS, _GROUP = 32, 4

# Of more features the sums could overflow: 255 * 127 * 66,311 < 2^31.
MOST_FEATURES = 66_311

_BYTES = "-(-out_features // 32) * (-(-in_features // 4) * 128 + 128)"

_LINEAR = Function(
    "int8_linear_forward",
    {
        "x": (FLOAT, "tokens", "in_features"),
        "packed": (torch.uint8, _BYTES),
        "scale": (FLOAT, "out_features"),
        "bias": (FLOAT, "out_features"),
        "out": (FLOAT, "tokens", "out_features"),
    },
    written=("out",),
    sizes="tokens in_features out_features out_stride threads kernel",
    optional=("bias",),
    strided=("out",),
)


def objection() -> str | None:
    """Why these functions cannot serve; None if they can."""
    return None if library.is_built("cpu") else library.status()["cpu"]


def kernels() -> dict[str, int]:
    """The kernels that the library and this processor have, each with the largest integer of its tokens."""
    levels = library.load("cpu").int8_levels
    return {name: found for name, number in KERNELS.items() if (found := levels(number))}


def levels() -> int:
    """The largest integer of tokens, which `reference.quantise_tokens` takes, by the kernel that `linear` takes."""
    return list(kernels().values())[-1]


def pack(weight: Tensor) -> Tensor:
    """A weight in the order in which the kernels read it, block by block, each followed by the sums of its columns.

    Args:
        weight: int8 `(out_features, in_features)`.

    Returns:
        uint8 `(bytes,)`.

    Raises:
        ValueError: the weight has so many input features that sums could overflow.
    """
    if weight.shape[1] > MOST_FEATURES:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}, but sums of more than {MOST_FEATURES} products can overflow "
            f"32 bits; keep the weight in floating point."
        )
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, -in_features % _GROUP, 0, -out_features % _COLUMNS))
    blocks = padded.view(-1, _COLUMNS, padded.shape[1] // _GROUP, _GROUP).transpose(1, 2).flatten(1)
    sums = padded.sum(1, dtype=torch.int32).view(-1, _COLUMNS)
    return torch.cat([blocks.contiguous().view(torch.uint8), sums.view(torch.uint8)], dim=1).flatten()


def unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight that `pack` took, int8 `(out_features, in_features)`."""
    groups = -(-in_features // _GROUP)
    blocks = packed.view(torch.int8).view(-1, (groups + 1) * _COLUMNS * _GROUP)[:, : groups * _COLUMNS * _GROUP]
    rows = blocks.reshape(-1, groups, _COLUMNS, _GROUP).transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[:out_features, :in_features].contiguous()


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """`reference.quantised_linear(x, weight, scale, bias, levels())`.

    Args:
        x: float32 `(tokens, in_features)` on the CPU.
        packed: `pack(weight)`.
        scale: float32 `(out_features,)`, of the weight's rows.
        bias: float32 `(out_features,)`, or None.
        out: float32 `(tokens, out_features)`, to be written to; its rows need not be adjacent in memory.
        kernel: a key of `kernels()`; None for the best.

    Returns:
        `out`, float32 `(tokens, out_features)`.

    Raises:
        ValueError, BuildError, RuntimeError: see `Function.__call__`.
    """
    out = x.new_empty(x.shape[0], scale.shape[0]) if out is None else out
    _LINEAR(
        x.device,
        x.dtype,
        x=x,
        packed=packed,
        scale=scale,
        bias=bias,
        out=out,
        out_stride=out.stride(0),
        threads=torch.get_num_threads(),
        kernel=KERNELS[kernel or list(kernels())[-1]],
    )
    return out
