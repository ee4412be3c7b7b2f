"""dropout(activation(x + bias)), forward and backward. Each kernel reads its inputs and writes its results once.

A program owns a block of features, keeps their bias in registers, and loops over its share of the rows. Its sum for the
bias's gradient stays in registers too, and is stored once, as a partial sum. Loads are not prefetched: other warps hide
them, and without prefetching a program takes fewer registers and instructions, so that more of them fit.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import Dropout
from .device import Device, cdiv, describe, share
from .dropout import drop_features, launch_arguments
from .launch import launch


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        block: features of a tile, a power of two; at least 4, because dropout draws for 4 at once.
        rows: rows of a tile, a power of two.
        warps: warps of a program.
        programs: programs per multiprocessor.
    """

    block: int
    rows: int
    warps: int
    programs: int

    @classmethod
    def for_tile(cls, lanes: int, features: int, itemsize: int, warps: int, programs: int) -> "Config":
        """A lane of a warp reads 16 bytes of a row, and has 8 elements of a tile: fastest on an H200, where 16 took 4 %
        longer in the forward and 3 % in the backward."""
        block = min(lanes * (16 // itemsize), max(4, triton.next_power_of_2(features)))
        return cls(block, warps * lanes * 8 // block, warps, programs)


@cache
def forward_config(lanes: int, features: int, itemsize: int) -> Config:
    """More programs than fit at once: those that end make room, and none waits for the slowest. On an H200 56 us at
    3072 features, with half as many 58 us."""
    return Config.for_tile(lanes, features, itemsize, warps=8, programs=16)


@cache
def backward_config(lanes: int, features: int, itemsize: int) -> Config:
    """On an H200 101 us at 3072 features, with twice as many programs 107 us: each adds partial sums."""
    return Config.for_tile(lanes, features, itemsize, warps=4, programs=8)


def forward(
    x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None, config: Config | None = None
) -> Tensor:
    """`(tokens, features)` in the dtype of x; launched by `config`, None for that of `forward_config`."""
    tokens, features = x.shape
    out = torch.empty_like(x)
    device = describe(x.device)
    config = config or forward_config(device.lanes, features, x.itemsize)
    programs, rows_per_program = _share(tokens, features, config, device)
    launch(
        _forward_kernel,
        (programs * cdiv(features, config.block),),
        x,
        bias,
        *launch_arguments(dropout),
        out,
        tokens,
        rows_per_program,
        activation,
        features,
        config.block,
        config.rows,
        num_warps=config.warps,
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout: Dropout | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias, empty if there is none; launched by `config`, None for that of `backward_config`."""
    tokens, features = x.shape
    grad_x = torch.empty_like(x)
    device = describe(x.device)
    config = config or backward_config(device.lanes, features, x.itemsize)
    programs, rows_per_program = _share(tokens, features, config, device)
    partials = None if bias is None else torch.empty(programs, features, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel,
        (programs * cdiv(features, config.block),),
        grad,
        x,
        bias,
        *launch_arguments(dropout),
        grad_x,
        partials,
        tokens,
        rows_per_program,
        activation,
        features,
        config.block,
        config.rows,
        num_warps=config.warps,
    )
    return grad_x, x.new_empty(0, dtype=torch.float32) if partials is None else partials.sum(0)


def _share(tokens: int, features: int, config: Config, device: Device) -> tuple[int, int]:
    """The number of programs that share the rows of a block of features, and the number of rows of each program."""
    programs = config.programs * device.multiprocessors // cdiv(features, config.block)
    return share(tokens, config.rows, programs)


@triton.jit
def _normal_cdf(x):
    """The normal distribution's probability below x, to 5e-8 in float32.

    libdevice's erf has two branches, and where lanes of a warp differ it computes both. One polynomial P serves all x:
    the probability below -t is 2^(-t P(t)) / 2 for t >= 0. P was fitted for the least error of t times that.
    """
    t = tl.abs(x)
    p = t * 1.9792705643340014e-06 - 2.9772985726594925e-05
    p = p * t + 0.00014393081073649228
    p = p * t + 0.00022982139489613473
    p = p * t - 0.007171187549829483
    p = p * t + 0.052560046315193176
    p = p * t + 0.45919114351272583
    p = p * t + 1.1511067152023315
    tail = tl.exp2(-1.0 - p * t)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return x * _normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        density = tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)
        return _normal_cdf(x) + x * density
    elif ACTIVATION == "gelu_tanh":
        sigmoid = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def _load_bias(ptr, features, FEATURES: tl.constexpr, ROWS: tl.constexpr):
    """Loads a block of the bias as float32 `[ROWS, BLOCK]` with equal rows.

    Loading it once per row gives its registers the layout of a tile. A single row would be spread over all warps.
    """
    features += tl.zeros([ROWS, 1], tl.int32)
    return tl.load(ptr + features, mask=features < FEATURES, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "rows_per_program", "threshold"])
def _forward_kernel(
    x_ptr,  # (tokens, FEATURES)
    bias_ptr,  # (FEATURES,), or None
    columns_ptr,  # (tokens,); None without dropout, like the next two
    sequence_ids_ptr,  # (tokens,)
    seed_ptr,  # one element
    threshold,
    rescale,
    out_ptr,  # (tokens, FEATURES)
    tokens,
    rows_per_program,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0) % tl.cdiv(FEATURES, BLOCK)
    features = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    if bias_ptr is not None:
        bias = _load_bias(bias_ptr, features, FEATURES, ROWS)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    first = tl.program_id(0) // tl.cdiv(FEATURES, BLOCK) * rows_per_program
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=1):
        rows = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (rows < tokens) & (features < FEATURES)
        x = tl.load(x_ptr + rows * FEATURES + features, mask=mask).to(tl.float32)
        if bias_ptr is not None:
            x += bias
        out = _activate(x, ACTIVATION)
        if seed_ptr is not None:
            column = tl.load(columns_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            sequence = tl.load(sequence_ids_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            out = drop_features(out, seed, threshold, rescale, column, sequence, block, BLOCK)
        tl.store(out_ptr + rows * FEATURES + features, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "rows_per_program", "threshold"])
def _backward_kernel(
    grad_ptr,  # (tokens, FEATURES)
    x_ptr,  # (tokens, FEATURES)
    bias_ptr,  # (FEATURES,), or None
    columns_ptr,  # (tokens,); None without dropout, like the next two
    sequence_ids_ptr,  # (tokens,)
    seed_ptr,  # one element
    threshold,
    rescale,
    grad_x_ptr,  # (tokens, FEATURES)
    partials_ptr,  # (programs, FEATURES) float32: each program's sum for the bias's gradient; None without bias
    tokens,
    rows_per_program,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0) % tl.cdiv(FEATURES, BLOCK)
    features = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    if bias_ptr is not None:
        bias = _load_bias(bias_ptr, features, FEATURES, ROWS)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)

    program = tl.program_id(0) // tl.cdiv(FEATURES, BLOCK)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=1):
        rows = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (rows < tokens) & (features < FEATURES)
        # Zeros beyond the ends make the gradient zero there, so that they add nothing to the bias's gradient.
        grad_x = tl.load(grad_ptr + rows * FEATURES + features, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * FEATURES + features, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias
        if seed_ptr is not None:
            column = tl.load(columns_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            sequence = tl.load(sequence_ids_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            grad_x = drop_features(grad_x, seed, threshold, rescale, column, sequence, block, BLOCK)
        grad_x *= _derivative(x, ACTIVATION)
        tl.store(grad_x_ptr + rows * FEATURES + features, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_bias += grad_x

    if partials_ptr is not None:
        sums = tl.sum(grad_bias, axis=0)[None, :]
        tl.store(partials_ptr + program * FEATURES + features, sums, mask=features < FEATURES)
