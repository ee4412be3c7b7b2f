"""Products of 8-bit integers on the CPU, alone and in whole layers: the bits of `reference.quantised_linear`."""

import ctypes
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import Norm
from . import layer, library
from .bias_gelu import ACTIVATIONS
from .function import FLOAT, INT, Filled, Function, Structure

# The numbers of `Int8Kernel` in csrc/int8_tile.h, the best last.
KERNELS = {"plain": 0, "avx2": 1, "avx512": 2, "avx_vnni": 3, "avx512_vnni": 4}

# The sizes of a block of a packed weight, as in csrc/int8_tile.h.
_COLUMNS, _GROUP = 32, 4

# Of more features the sums could overflow: 255 * 127 * 66,311 < 2^31.
MOST_FEATURES = 66_311


def _bytes(out_features: str, in_features: str) -> str:
    """The size of a packed weight, as a dimension of a `Function`'s tensor."""
    return f"-(-{out_features} // 32) * (-(-{in_features} // 4) * 128 + 128)"


_LEVELS = Function("int8_levels", {"levels": (INT, "kernels")}, written=("levels",), sizes="kernels")

_LINEAR = Function(
    "int8_linear_forward",
    {
        "x": (FLOAT, "tokens", "in_features"),
        "packed": (torch.uint8, _bytes("out_features", "in_features")),
        "scale": (FLOAT, "out_features"),
        "bias": (FLOAT, "out_features"),
        "out": (FLOAT, "tokens", "out_features"),
    },
    written=("out",),
    sizes="tokens in_features out_features out_stride threads kernel",
    optional=("bias",),
    strided=("out",),
)

_LAYER = Structure(
    "Int8Layer",
    {
        **{
            f"{name}_{part}": tensor
            for name, shape in layer.LINEARS.items()
            for part, tensor in (
                ("packed", (torch.uint8, _bytes(*shape))),
                ("scale", (FLOAT, shape[0])),
                ("bias", (FLOAT, shape[0])),
            )
        },
        **layer.NORMS,
    },
    sizes=f"{layer.SIZES} kernel",
    factors=layer.FACTORS,
    optional=tuple(f"{name}_bias" for name in layer.LINEARS),
)

# Takes the parameters of layers that `layer_parameters` gives.
LAYERS = layer.forward_of("int8_layers_forward")


class PackedLinear(NamedTuple):
    """A linear's parameters: `pack(weight)`, the scales of the weight's rows, and the bias or None; see `linear`."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None


def objection() -> str | None:
    """Why these functions cannot serve; None if they can."""
    return None if library.is_built("cpu") else library.status()["cpu"]


def kernels() -> dict[str, int]:
    """The kernels that the library and this processor have, the best last, with the largest integer of a token."""
    return _kernels(library.load("cpu"))


@functools.cache
def _kernels(loaded: ctypes.CDLL) -> dict[str, int]:
    levels = torch.empty(len(KERNELS), dtype=torch.int64)
    _LEVELS(levels.device, torch.float32, levels=levels)
    return {name: most for name, most in zip(KERNELS, levels.tolist(), strict=True) if most}


def levels() -> int:
    """The largest integer of a token by the best kernel, which `reference.quantise_tokens` takes."""
    return kernels()[_best()]


def _best() -> str:
    return next(reversed(kernels()))


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
        kernel=_number(kernel),
    )
    return out


def layer_parameters(
    linears: dict[str, PackedLinear],
    norms: dict[str, Norm],
    heads: int,
    scale: float,
    activation: str,
    kernel: str | None = None,
) -> Filled:
    """A layer's parameters, for `Layers` with the function `LAYERS`, which has the bits of `linear` and the native ops.

    Args:
        linears: `q`, `k`, `v`, `out`, `up` and `down`.
        norms: `norm1` and `norm2`, in float32, each with a bias.
        heads, scale: as in `ops.attention`.
        activation: a key of `ACTIVATIONS`.
        kernel: as in `linear`.

    Raises:
        ValueError: see `Structure.fill`.
    """
    return _LAYER.fill(
        torch.device("cpu"),
        FLOAT,
        **{
            f"{name}_{part}": value
            for name, each in {**linears, **norms}.items()
            for part, value in each._asdict().items()
        },
        heads=heads,
        activation=ACTIVATIONS[activation],
        kernel=_number(kernel),
        scale=scale,
    )


def _number(kernel: str | None) -> int:
    """The kernel's number in csrc/; that of the best one for None."""
    return KERNELS[kernel or _best()]
