"""Rows of 8-bit numbers for matrix products, and results from the sums of their products.

`quantise` reads a tensor once and writes it once: a row stays in registers between its maximum and its rounding.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import largest_of
from .device import cdiv
from .launch import launch

_LEAST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
# Between 2^23 and 2^24, neighbours in float32 are 1 apart.
_WHOLE_NUMBERS = tl.constexpr(1.5 * 2**23)

_FEATURES_PER_WARP = 1024  # 32 for each lane, which hold them in registers
_DEQUANTISED_PER_WARP = 512


class Config(NamedTuple):
    """
    Attributes:
        block: features of a tile, a power of two.
        rows: rows of a tile, a power of two.
        warps: warps of a program.
    """

    block: int
    rows: int
    warps: int


@cache
def quantise_config(features: int) -> Config:
    """Whole rows, as few as leave no warp without a part of one."""
    block = triton.next_power_of_2(features)
    row_warps = min(32, max(1, block // _FEATURES_PER_WARP))
    warps = max(4, row_warps)
    return Config(block, warps // row_warps, warps)


@cache
def dequantise_config(features: int) -> Config:
    warps = 4
    block = min(256, triton.next_power_of_2(features))
    return Config(block, warps * _DEQUANTISED_PER_WARP // block, warps)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `reference.quantise`, bit for bit. float8_e4m3fn takes compute capability 8.9."""
    tokens, features = x.shape
    values = torch.empty_like(x, dtype=dtype)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    config = quantise_config(features)
    launch(
        _quantise_kernel,
        (max(1, cdiv(tokens, config.rows)),),
        x,
        values,
        scale,
        tokens,
        features,
        config.block,
        config.rows,
        float(largest_of(dtype)),
        num_warps=config.warps,
    )
    return values, scale


def dequantise(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `reference.dequantise`."""
    tokens, features = len(scale), sums.shape[1]
    out = torch.empty(tokens, features, dtype=dtype, device=sums.device)
    config = dequantise_config(features)
    programs = max(1, cdiv(tokens, config.rows)) * cdiv(features, config.block)
    launch(
        _dequantise_kernel,
        (programs,),
        sums,
        scale,
        weight_scale,
        bias,
        out,
        tokens,
        features,
        config.block,
        config.rows,
        num_warps=config.warps,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _quantise_kernel(
    x_ptr,  # (tokens, FEATURES)
    values_ptr,  # (tokens, FEATURES) int8 or float8
    scale_ptr,  # (tokens,) float32
    tokens,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    features = tl.arange(0, BLOCK)[None, :]
    mask = (rows < tokens) & (features < FEATURES)
    x = tl.load(x_ptr + rows * FEATURES + features, mask=mask, other=0.0).to(tl.float32)
    size = tl.abs(x)
    size = tl.where(size < float("inf"), size, float("inf"))  # NaN, which is not less, counts as infinity
    size = tl.max(size, axis=1)[:, None]
    scale = tl.div_rn(size, LARGEST)
    scale = tl.where(scale < _LEAST_SCALE, 0.0, scale)
    scale = tl.where(size < float("inf"), scale, float("nan"))
    inverse = tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0))
    values = tl.where(scale > 0.0, x * inverse, 0.0)
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    if values_ptr.dtype.element_ty == tl.int8:
        # Rounds to the nearest, and ties to the even one. The compiler cannot fuse this sum with the product above,
        # which would then not be rounded by itself.
        values = (values + _WHOLE_NUMBERS) - _WHOLE_NUMBERS
    tl.store(values_ptr + rows * FEATURES + features, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _dequantise_kernel(
    sums_ptr,  # (tokens or more, FEATURES) int32
    scale_ptr,  # (tokens,) float32
    weight_scale_ptr,  # (FEATURES,) float32
    bias_ptr,  # (FEATURES,), or None
    out_ptr,  # (tokens, FEATURES)
    tokens,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(FEATURES, BLOCK)
    rows = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    features = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < tokens) & (features < FEATURES)
    sums = tl.load(sums_ptr + rows * FEATURES + features, mask=mask, other=0)
    scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + features, mask=features < FEATURES, other=0.0)
    out = sums.to(tl.float32) * (scale * weight_scale)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + features, mask=features < FEATURES, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * FEATURES + features, out.to(out_ptr.dtype.element_ty), mask=mask)
