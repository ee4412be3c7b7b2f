"""Products with packed weights on the CPU: of 8-bit integers, bfloat16 or float32, alone and in whole layers.

Those of integers have the bits of `reference.quantised_linear`.
"""

import ctypes
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import Norm
from . import layer, library
from .bias_gelu import ACTIVATIONS
from .function import DTYPES, FLOAT, INT, Filled, Function, Structure

# The numbers of `PackedKernel` in csrc/packed_tile.h; of those for a format the best last.
_NUMBERS = {
    name: number
    for number, name in enumerate(
        (
            "plain",
            "avx2",
            "avx512",
            "avx_vnni",
            "avx512_vnni",
            "amx_int8",
            "avx512_bf16",
            "amx_bf16",
            "avx2_float",
            "avx512_float",
        )
    )
}

# The sizes of a block of a packed weight, as in csrc/packed_tile.h; those of a group are bytes.
_COLUMNS, _GROUP = 32, 4

# Of more features the sums of integers could overflow: 255 * 127 * 66,311 < 2^31.
MOST_FEATURES = 66_311


def _bytes(dtype: torch.dtype, out_features: str, in_features: str) -> str:
    """The size of a packed weight, as a dimension of a `Function`'s tensor."""
    groups = f"-(-{in_features} // {_GROUP // dtype.itemsize})"
    return f"-(-{out_features} // 32) * ({groups} * 128{' + 128' if dtype == torch.int8 else ''})"


_LEVELS = Function("packed_levels", {"levels": (INT, "kernels")}, written=("levels",), sizes="kernels")


def _linear_of(dtype: torch.dtype) -> Function:
    return Function(
        "packed_linear_forward",
        {
            "x": (FLOAT, "tokens", "in_features"),
            "packed": (torch.uint8, _bytes(dtype, "out_features", "in_features")),
            "scale": (FLOAT, "out_features"),
            "bias": (FLOAT, "out_features"),
            "out": (FLOAT, "tokens", "out_features"),
        },
        written=("out",),
        sizes="tokens in_features out_features out_stride threads kernel",
        optional=_optional(dtype, "scale", "bias"),
        strided=("out",),
    )


def _layer_of(dtype: torch.dtype) -> Structure:
    """A layer's parameters, with its weights in a dtype."""
    return Structure(
        "PackedLayer",
        {
            **{
                f"{name}_{part}": tensor
                for name, shape in layer.LINEARS.items()
                for part, tensor in (
                    ("packed", (torch.uint8, _bytes(dtype, *shape))),
                    ("scale", (FLOAT, shape[0])),
                    ("bias", (FLOAT, shape[0])),
                )
            },
            **layer.NORMS,
        },
        sizes=f"{layer.SIZES} kernel attention_dtype",
        factors=layer.FACTORS,
        optional=tuple(each for name in layer.LINEARS for each in _optional(dtype, f"{name}_scale", f"{name}_bias")),
    )


def _optional(dtype: torch.dtype, scale: str, bias: str) -> tuple[str, ...]:
    return (bias,) if dtype == torch.int8 else (scale, bias)


WEIGHTS = (torch.int8, torch.bfloat16, torch.float32)
_LINEARS = {dtype: _linear_of(dtype) for dtype in WEIGHTS}
_LAYERS = {dtype: _layer_of(dtype) for dtype in WEIGHTS}

# Takes the parameters of layers that `layer_parameters` gives.
LAYERS = layer.forward_of("packed_layers_forward")


class PackedLinear(NamedTuple):
    """A linear's parameters; see `linear`."""

    packed: Tensor
    scale: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype


def objection() -> str | None:
    """Why these functions cannot serve; None if they can."""
    return None if library.is_built("cpu") else library.status()["cpu"]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the library and this processor have products of weights in a dtype."""
    return objection() is None and bool(kernels(dtype))


def attention_dtype(weights: torch.dtype) -> torch.dtype:
    """The dtype that attention computes in, in a layer whose linears have weights of the dtype `weights`.

    It is bfloat16 if the weights are rounded and the processor can multiply bfloat16: on an EPYC (Zen 4), attention
    over 512 tokens then takes 0.66 times as long as in float32, and the next product rounds its results anyway.
    """
    return torch.bfloat16 if weights != torch.float32 and multiplies(torch.bfloat16) else torch.float32


def kernels(dtype: torch.dtype) -> list[str]:
    """The kernels for weights in a dtype that the library and this processor have, the best last."""
    wanted = {torch.int8: range(1, 256), torch.bfloat16: (-1,), torch.float32: (-2,)}[dtype]
    return [name for name, levels in _levels(library.load("cpu")).items() if levels in wanted]


@functools.cache
def _levels(loaded: ctypes.CDLL) -> dict[str, int]:
    """For each kernel its LEVELS, as in csrc/packed_tile.h; 0 if there is none here."""
    levels = torch.empty(len(_NUMBERS), dtype=torch.int64)
    _LEVELS(levels.device, torch.float32, levels=levels)
    return dict(zip(_NUMBERS, levels.tolist(), strict=True))


def levels(kernel: str | None = None) -> int:
    """The largest integer of a token by a kernel, which `reference.quantise_tokens` takes; None for the best."""
    return _levels(library.load("cpu"))[kernel or kernels(torch.int8)[-1]]


def pack(weight: Tensor) -> Tensor:
    """A weight in the order in which the kernels read it, block by block; integers with the sums of each column.

    Args:
        weight: int8, bfloat16 or float32 `(out_features, in_features)`.

    Returns:
        uint8 `(bytes,)`.

    Raises:
        ValueError: a weight of integers has so many input features that sums could overflow.
    """
    integers = weight.dtype == torch.int8
    if integers and weight.shape[1] > MOST_FEATURES:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}, but sums of more than {MOST_FEATURES} products can overflow "
            f"32 bits; keep the weight in floating point."
        )
    out_features, in_features = weight.shape
    size = _GROUP // weight.itemsize
    padded = F.pad(weight, (0, -in_features % size, 0, -out_features % _COLUMNS))
    blocks = padded.view(-1, _COLUMNS, padded.shape[1] // size, size).transpose(1, 2).flatten(1)
    parts = [blocks.contiguous().view(torch.uint8)]
    if integers:
        parts.append(padded.sum(1, dtype=torch.int32).view(-1, _COLUMNS).view(torch.uint8))
    return torch.cat(parts, dim=1).flatten()


def unpack(packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight that `pack` took, `(out_features, in_features)`."""
    size = _GROUP // dtype.itemsize
    groups = -(-in_features // size)
    blocks = packed.view(-(-out_features // _COLUMNS), -1)[:, : groups * _COLUMNS * _GROUP].contiguous().view(dtype)
    rows = blocks.view(-1, groups, _COLUMNS, size).transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[:out_features, :in_features].contiguous()


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """x Wᵀ + b; of integers it is `reference.quantised_linear(x, weight, scale, bias, levels(kernel))`.

    Args:
        x: float32 `(tokens, in_features)` on the CPU.
        packed: `pack(weight)`.
        scale: float32 `(out_features,)`, of the rows of a weight of integers, else None.
        bias: float32 `(out_features,)`, or None.
        dtype: of the weight. With bfloat16, `x` is rounded to it. Sums are in float32.
        out: float32 `(tokens, out_features)`, to be written to; its rows need not be adjacent in memory. Needed if
            neither scale nor bias tells the number of features.
        kernel: one of `kernels(dtype)`; None for the best.

    Returns:
        `out`, float32 `(tokens, out_features)`.

    Raises:
        ValueError, BuildError, RuntimeError: see `Function.__call__`.
    """
    if out is None:
        out = x.new_empty(x.shape[0], len(bias if scale is None else scale))
    _LINEARS[dtype](
        x.device,
        x.dtype,
        x=x,
        packed=packed,
        scale=scale,
        bias=bias,
        out=out,
        out_stride=out.stride(0),
        threads=torch.get_num_threads(),
        kernel=_number(kernel, dtype),
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

    Attention is in `attention_dtype` of the weights.

    Args:
        linears: `q`, `k`, `v`, `out`, `up` and `down`, all in the same dtype.
        norms: `norm1` and `norm2`, in float32, each with a bias.
        heads, scale: as in `ops.attention`.
        activation: a key of `ACTIVATIONS`.
        kernel: as in `linear`.

    Raises:
        ValueError: see `Structure.fill`.
    """
    dtype = linears["q"].dtype
    return _LAYERS[dtype].fill(
        torch.device("cpu"),
        FLOAT,
        **{
            f"{name}_{part}": value
            for name, each in {**linears, **norms}.items()
            for part, value in each._asdict().items()
            if part != "dtype"
        },
        heads=heads,
        activation=ACTIVATIONS[activation],
        kernel=_number(kernel, dtype),
        attention_dtype=DTYPES[attention_dtype(dtype)],
        scale=scale,
    )


def _number(kernel: str | None, dtype: torch.dtype) -> int:
    """The kernel's number in csrc/; for None that of the best one."""
    return _NUMBERS[kernel or kernels(dtype)[-1]]
