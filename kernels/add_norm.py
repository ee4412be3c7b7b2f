"""LN(residual + dropout(x + bias)), forward and backward. Each kernel reads its inputs and writes its results once.

Without x, the kernels compute the plain layer norm of the residual.

A tile is a few rows. A row is a tuple of `CHUNKS` chunks of features, each a power of two wide: 768 = 3 · 256 leaves no
lane idle. Up to 768 features, one warp holds a whole row, so that a row's sums need no other warp. Mean and variance
are computed in float32, from values in registers, in two passes.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import Dropout
from ..reference import Norm, NormScale
from .device import Device, cdiv, describe, is_amd, is_rdna, share
from .dropout import drop_features, launch_arguments
from .launch import launch

_FEATURES_PER_LANE = 24  # the registers that a lane needs for one value of a row; the backward holds seven such values
_FEATURES_PER_LANE_OF_RDNA = 16  # RDNA's compiler needs more registers for dropout
_MAX_CHUNKS = 8

# How many warps of the backward fit a multiprocessor, if a lane has few features of a row or more: in 16 bits, and in
# float32, whose tiles in flight take twice the shared memory (on AMD's GPUs, registers).
_FEW_FEATURES_PER_LANE, _WARPS_WITH_FEW, _WARPS_WITH_MORE = 16, (12, 8), (8, 6)
_REGISTERS = 65536  # of a multiprocessor of NVIDIA's

# The sum of the partial sums: narrow blocks, so that every multiprocessor has one, in few and therefore large steps.
_SUM_BLOCK, _SUM_ROWS, _SUM_WARPS = 16, 512, 8


@dataclass(frozen=True)
class Config:
    """How rows are cut into tiles.

    Attributes:
        block: features of a chunk, a power of two.
        chunks: chunks of a row.
        rows: rows of a tile, a power of two.
        warps: warps of a program.
    """

    block: int
    chunks: int
    rows: int
    warps: int

    @classmethod
    def for_rows(cls, device: Device, hidden: int, itemsize: int, warps: int, **rest: int) -> "Config":
        """Gives each row the fewest warps that can hold it, 16-byte loads, and the least padding in up to 8 chunks."""
        row_warps = min(warps, triton.next_power_of_2(cdiv(hidden, _features_per_warp(device))))
        vector = 16 // itemsize
        span = row_warps * device.lanes * vector
        blocks = [span >> shift for shift in range((span // vector).bit_length())]
        few = (block for block in blocks if hidden <= _MAX_CHUNKS * block)
        block = min(few, key=lambda block: -hidden % block, default=span)
        rows = warps // row_warps * (span // block)
        return cls(block, cdiv(hidden, block), rows, warps, **rest)


@dataclass(frozen=True)
class LoopConfig(Config):
    """A program loops over its share of the rows.

    Attributes:
        stages: tiles that are in use or in flight.
        programs: programs per multiprocessor.
    """

    stages: int
    programs: int


def _features_per_warp(device: Device) -> int:
    return device.lanes * (_FEATURES_PER_LANE_OF_RDNA if is_rdna(device.arch) else _FEATURES_PER_LANE)


@cache
def forward_config(device: Device, hidden: int, itemsize: int) -> Config:
    """A program has one tile and few registers, so that many are resident and hide one another's loads."""
    warps = 8 if is_rdna(device.arch) else 4  # on AMD's RDNA, four warps lack the registers for 4096 features
    return Config.for_rows(device, hidden, itemsize, warps)


@cache
def backward_config(device: Device, hidden: int, itemsize: int) -> LoopConfig:
    """A program has the warps of one row, so that the rows of no other warp are waited for.

    A row takes a warp longer than its instructions do, because sums over lanes have to be waited for; other warps run
    meanwhile. So there are as many as fit. Of two stages, Triton keeps a tile in flight on AMD's GPUs; on NVIDIA's it
    takes three.
    """
    warps = min(8, triton.next_power_of_2(cdiv(hidden, _features_per_warp(device))))
    stages = 2 if is_amd(device.arch) else 3
    config = LoopConfig.for_rows(device, hidden, itemsize, warps, stages=stages, programs=1)
    features_per_lane = config.block * config.chunks * config.rows // (warps * device.lanes)
    resident = _WARPS_WITH_FEW if features_per_lane <= _FEW_FEATURES_PER_LANE else _WARPS_WITH_MORE
    return replace(config, programs=max(1, resident[itemsize > 2] // warps))


def forward(
    residual: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    dropout: Dropout | None,
    save: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The result and, for the backward, the layer norm's input (None unless `save`); both `(tokens, hidden)`.

    `config` is the launch, None for that of `forward_config`.
    """
    tokens, hidden = residual.shape
    out = torch.empty_like(residual, dtype=torch.promote_types(residual.dtype, (residual if x is None else x).dtype))
    z = torch.empty_like(out) if save else None
    device = describe(residual.device)
    config = config or forward_config(device, hidden, out.itemsize)
    launch(
        _forward_kernel,
        (max(1, cdiv(tokens, config.rows)),),
        residual,
        x,
        bias,
        *norm,
        *launch_arguments(dropout),
        out,
        z,
        tokens,
        hidden,
        config.block,
        config.chunks,
        config.rows,
        num_warps=config.warps,
    )
    return out, z


def backward(
    grad: Tensor,
    z: Tensor,
    norm: NormScale,
    dropout: Dropout | None,
    config: Config | None = None,
    sums: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of residual, x, bias, and the norm's weight and bias, the last three in the dtype `sums`.

    Without dropout, x has the same gradient as the residual, and an empty tensor is returned for it. `config` is the
    launch, None for that of `backward_config`.
    """
    tokens, hidden = z.shape
    grad_z = torch.empty_like(z)
    grad_x = None if dropout is None else torch.empty_like(z)
    device = describe(z.device)
    config = config or backward_config(device, hidden, z.itemsize)
    programs, rows_per_program = share(tokens, config.rows, config.programs * device.multiprocessors)
    partials = torch.empty(3, programs * config.rows, hidden, dtype=torch.float32, device=z.device)
    launch(
        _backward_kernel,
        (programs,),
        grad,
        z,
        norm.weight,
        norm.eps,
        *launch_arguments(dropout),
        grad_z,
        grad_x,
        partials,
        tokens,
        rows_per_program,
        hidden,
        config.block,
        config.chunks,
        config.rows,
        config.stages,
        num_warps=config.warps,
        **_register_limit(device, config),
    )
    return grad_z, z.new_empty(0) if grad_x is None else grad_x, *_sums(partials, sums)


def _register_limit(device: Device, config: LoopConfig) -> dict[str, int]:
    """The launch option with which all programs fit: left alone, the compiler takes 197 registers where 162 do."""
    if not device.arch.startswith("sm_"):
        return {}
    registers = _REGISTERS // (config.programs * config.warps * device.lanes)
    return {"maxnreg": min(255, registers // 8 * 8)}  # they are given in eights


def _sums(partials: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The sums over the rows of `(3, rows, hidden)`, in one launch."""
    _, rows, hidden = partials.shape
    sums = [partials.new_empty(hidden, dtype=dtype) for _ in range(3)]
    launch(
        _sum_kernel,
        (cdiv(hidden, _SUM_BLOCK), 3),
        partials,
        *sums,
        rows,
        hidden,
        _SUM_BLOCK,
        _SUM_ROWS,
        num_warps=_SUM_WARPS,
    )
    return sums


@triton.jit
def _features(chunk: tl.constexpr, BLOCK: tl.constexpr):
    return chunk * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _load_vector(ptr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Loads `(HIDDEN,)` as float32 chunks `[ROWS, BLOCK]` with equal rows, and zeros beyond the end.

    Loading the vector once per row gives its registers the layout of a tile. A single row would be spread over all
    warps and then converted.
    """
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        features = _features(chunk, BLOCK) + tl.zeros([ROWS, 1], tl.int32)
        chunks += (tl.load(ptr + features, mask=features < HIDDEN, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def _load_rows(ptr, rows, tokens, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Loads rows of `(tokens, HIDDEN)` as float32 chunks `[ROWS, BLOCK]`, with zeros beyond the ends."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        features = _features(chunk, BLOCK)
        mask = (rows < tokens) & (features < HIDDEN)
        chunks += (tl.load(ptr + rows * HIDDEN + features, mask=mask, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def _store_rows(ptr, rows, tokens, chunks, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    for chunk in tl.static_range(CHUNKS):
        features = _features(chunk, BLOCK)
        mask = (rows < tokens) & (features < HIDDEN)
        tl.store(ptr + rows * HIDDEN + features, chunks[chunk].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropout(chunks, seed, threshold, rescale, column, sequence, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    dropped = ()
    for chunk in tl.static_range(CHUNKS):
        dropped += (drop_features(chunks[chunk], seed, threshold, rescale, column, sequence, chunk, BLOCK),)
    return dropped


@triton.jit
def _row_sums(chunks, CHUNKS: tl.constexpr):
    """The sum of each row, `[ROWS, 1]`."""
    total = chunks[0]
    for chunk in tl.static_range(1, CHUNKS):
        total += chunks[chunk]
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def _normalise(z, real, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows with mean 0 and variance 1, zeros beyond the ends; and their reciprocal standard deviations, `[ROWS, 1]`.

    The mean is subtracted twice, as in the reference, because rounding the first mean leaves all elements of a row off
    by the same few units in the last place.
    """
    centred = _subtract(z, _row_sums(z, CHUNKS) / HIDDEN, HIDDEN, BLOCK, CHUNKS)
    # Unlike the division above, this one rounds to nearest, so that HIDDEN · x / HIDDEN is exactly x.
    centred = _subtract(centred, tl.div_rn(_row_sums(centred, CHUNKS), HIDDEN * 1.0), HIDDEN, BLOCK, CHUNKS)
    variance = _row_sums(_multiply(centred, centred, CHUNKS), CHUNKS) / HIDDEN
    rstd = tl.where(real, tl.rsqrt(variance + eps), 0.0)
    normal = ()
    for chunk in tl.static_range(CHUNKS):
        normal += (centred[chunk] * rstd,)
    return normal, rstd


@triton.jit
def _subtract(z, mean, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Each row minus its `mean`, `[ROWS, 1]`; zeros beyond the end of a row."""
    centred = ()
    for chunk in tl.static_range(CHUNKS):
        centred += (tl.where(_features(chunk, BLOCK) < HIDDEN, z[chunk] - mean, 0.0),)
    return centred


@triton.jit(do_not_specialize=["tokens", "threshold"])
def _forward_kernel(
    residual_ptr,  # (tokens, HIDDEN)
    x_ptr,  # (tokens, HIDDEN), or None
    bias_ptr,  # (HIDDEN,), or None
    weight_ptr,  # (HIDDEN,)
    norm_bias_ptr,  # (HIDDEN,)
    eps,
    columns_ptr,  # (tokens,); None without dropout, like the next two
    sequence_ids_ptr,  # (tokens,)
    seed_ptr,  # one element
    threshold,
    rescale,
    out_ptr,  # (tokens, HIDDEN)
    z_ptr,  # (tokens, HIDDEN), or None
    tokens,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    z = _load_rows(residual_ptr, rows, tokens, HIDDEN, BLOCK, CHUNKS)
    if x_ptr is not None:
        x = _load_rows(x_ptr, rows, tokens, HIDDEN, BLOCK, CHUNKS)
        if bias_ptr is not None:
            x = _add(x, _load_vector(bias_ptr, HIDDEN, ROWS, BLOCK, CHUNKS), CHUNKS)
        if seed_ptr is not None:
            column = tl.load(columns_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            sequence = tl.load(sequence_ids_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            seed = tl.load(seed_ptr)
            x = _dropout(x, seed, threshold, rescale, column, sequence, BLOCK, CHUNKS)
        z = _add(z, x, CHUNKS)
    if z_ptr is not None:
        _store_rows(z_ptr, rows, tokens, z, HIDDEN, BLOCK, CHUNKS)
    normal, _ = _normalise(z, rows < tokens, eps, HIDDEN, BLOCK, CHUNKS)
    weight = _load_vector(weight_ptr, HIDDEN, ROWS, BLOCK, CHUNKS)
    norm_bias = _load_vector(norm_bias_ptr, HIDDEN, ROWS, BLOCK, CHUNKS)
    out = _add(_multiply(normal, weight, CHUNKS), norm_bias, CHUNKS)
    _store_rows(out_ptr, rows, tokens, out, HIDDEN, BLOCK, CHUNKS)


@triton.jit(do_not_specialize=["tokens", "rows_per_program", "threshold"])
def _backward_kernel(
    grad_ptr,  # (tokens, HIDDEN)
    z_ptr,  # (tokens, HIDDEN)
    weight_ptr,  # (HIDDEN,)
    eps,
    columns_ptr,  # (tokens,); None without dropout, like the next two
    sequence_ids_ptr,  # (tokens,)
    seed_ptr,  # one element
    threshold,
    rescale,
    grad_z_ptr,  # (tokens, HIDDEN)
    grad_x_ptr,  # (tokens, HIDDEN); None without dropout, because it would equal grad_z
    partials_ptr,  # (3, programs · ROWS, HIDDEN) float32: sums for the gradients of bias, weight, norm_bias
    tokens,
    rows_per_program,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    weight = _load_vector(weight_ptr, HIDDEN, ROWS, BLOCK, CHUNKS)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    grad_bias = _zeros(ROWS, BLOCK, CHUNKS)
    grad_weight = _zeros(ROWS, BLOCK, CHUNKS)
    grad_norm_bias = _zeros(ROWS, BLOCK, CHUNKS)

    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        grad = _load_rows(grad_ptr, rows, tokens, HIDDEN, BLOCK, CHUNKS)
        z = _load_rows(z_ptr, rows, tokens, HIDDEN, BLOCK, CHUNKS)
        normal, rstd = _normalise(z, rows < tokens, eps, HIDDEN, BLOCK, CHUNKS)
        grad_weight = _add(grad_weight, _multiply(grad, normal, CHUNKS), CHUNKS)
        grad_norm_bias = _add(grad_norm_bias, grad, CHUNKS)

        grad_normal = _multiply(grad, weight, CHUNKS)
        mean = _row_sums(grad_normal, CHUNKS) / HIDDEN
        slope = _row_sums(_multiply(grad_normal, normal, CHUNKS), CHUNKS) / HIDDEN
        grad_z = ()
        for chunk in tl.static_range(CHUNKS):
            grad_z += ((grad_normal[chunk] - mean - normal[chunk] * slope) * rstd,)
        _store_rows(grad_z_ptr, rows, tokens, grad_z, HIDDEN, BLOCK, CHUNKS)
        if seed_ptr is not None:
            column = tl.load(columns_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            sequence = tl.load(sequence_ids_ptr + rows, mask=rows < tokens, other=0).to(tl.int32)
            grad_x = _dropout(grad_z, seed, threshold, rescale, column, sequence, BLOCK, CHUNKS)
            _store_rows(grad_x_ptr, rows, tokens, grad_x, HIDDEN, BLOCK, CHUNKS)
            grad_bias = _add(grad_bias, grad_x, CHUNKS)
        else:
            grad_bias = _add(grad_bias, grad_z, CHUNKS)

    # A sum over the tile's rows would exchange them through shared memory, which takes longer than to store them all.
    sums = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    count = tl.num_programs(0) * ROWS
    _store_rows(partials_ptr, sums, count, grad_bias, HIDDEN, BLOCK, CHUNKS)
    _store_rows(partials_ptr + count * HIDDEN, sums, count, grad_weight, HIDDEN, BLOCK, CHUNKS)
    _store_rows(partials_ptr + 2 * count * HIDDEN, sums, count, grad_norm_bias, HIDDEN, BLOCK, CHUNKS)


@triton.jit
def _add(left, right, CHUNKS: tl.constexpr):
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        chunks += (left[chunk] + right[chunk],)
    return chunks


@triton.jit
def _multiply(left, right, CHUNKS: tl.constexpr):
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        chunks += (left[chunk] * right[chunk],)
    return chunks


@triton.jit
def _zeros(ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(CHUNKS):
        chunks += (tl.zeros([ROWS, BLOCK], tl.float32),)
    return chunks


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(
    partials_ptr,  # (3, count, HIDDEN) float32
    grad_bias_ptr,  # (HIDDEN,), like the next two
    grad_weight_ptr,
    grad_norm_bias_ptr,
    count,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    features = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    vector = tl.program_id(1)
    partials_ptr += vector * count * HIDDEN
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=1):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < count) & (features < HIDDEN)[None, :]
        sums += tl.load(partials_ptr + rows * HIDDEN + features[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    if vector == 0:
        tl.store(grad_bias_ptr + features, total, mask=features < HIDDEN)
    elif vector == 1:
        tl.store(grad_weight_ptr + features, total, mask=features < HIDDEN)
    else:
        tl.store(grad_norm_bias_ptr + features, total, mask=features < HIDDEN)
