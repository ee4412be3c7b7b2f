"""softmax(Q Kᵀ · scale) with dropout, times V, within each sequence, forward and backward; packed and padded alike.

A program owns one head and one block of a sequence's queries or keys, and streams the sequence past that block (Dao,
"FlashAttention-2", arXiv 2307.08691). Queries, keys and values are read where the projection wrote them. Programs start
in the order of their sequences' lengths, longest first, so that no long sequence starts when the others have finished.

Softmax computes exp2 of `score · factor + offset`, where `factor = scale · log₂ e` and `offset = -largest · factor`, in
one fused multiply-add. The scale must be positive. The offset is rounded, by up to 2⁻²⁴ of its size, but the product is
not. So the rounding multiplies all exponentials of a row, and their sum, by one number, and cancels, as long as the
backward uses the very offset of the forward. (The number is below 2¹⁶, the range of float16, for scores up to 2²⁷.)
That is also why the forward saves a row's offset and sum apart: added up as logarithms, they would keep few digits of
the sum beside a large offset.

Tiles that lie within the sequence are computed in a loop of their own, without masks; the last keys of a sequence, if
they fill no tile, come after it. Key biases apply in both; scores that have them are scaled first, and then the factor
is log₂ e alone. Where queries have key ranges, tiles are left out that no query of a program sees.

The backward uses no atomics in either of its two designs (`takes_one_pass` chooses), so it is deterministic. With two
passes, a program owns a block of queries in the first and a block of keys in the second, and keeps its sums in
registers. With one pass, a program owns a whole sequence and head: each probability is computed once, but the gradients
of the queries are added up in memory.
"""

from functools import cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import Sequences
from ..dropout import Dropout
from .attention_configs import Config, backward_config, forward_config, one_pass_config, takes_one_pass
from .device import cdiv, describe, is_amd
from .dropout import dropout_mask, dropout_mask_of_columns, interleaved, launch_arguments
from .launch import launch

LOG2_E = tl.constexpr(log2(e))
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)


def forward(
    qkv: Tensor,
    sequences: Sequences,
    heads: int,
    scale: float,
    dropout: Dropout | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as `ops.attention` defines it; launched by `config`, None for that of `forward_config`.

    Returns:
        The result, `(tokens, heads · head_dim)`; and `statistics`, float32 `(2, heads, tokens)`: the offset of each
        row, and 1 over the sum of its exponentials.
    """
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    out = qkv.new_empty(tokens, heads * head_dim)
    statistics = torch.empty(2, heads, tokens, dtype=torch.float32, device=qkv.device)
    arch = describe(qkv.device).arch
    biased = sequences.key_bias is not None
    config = config or forward_config(arch, qkv.dtype, head_dim, sequences.max_seqlen, dropout is not None, biased)
    blocks = cdiv(sequences.max_seqlen, config.block)
    if tokens:
        launch(
            _forward_kernel,
            (sequences.longest_first.shape[0] * blocks * heads,),
            qkv,
            *_pointers(sequences, dropout),
            out,
            statistics,
            tokens,
            blocks,
            scale,
            *_constants(arch, qkv.dtype, heads, head_dim, config, sequences),
            _interleaves(arch, sequences, dropout),
            sequences.max_seqlen <= config.step,
            num_warps=config.warps,
        )
    return out, statistics


def backward(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    qkv: Tensor,
    sequences: Sequences,
    heads: int,
    scale: float,
    dropout: Dropout | None,
    one_pass: bool | None = None,
    config: Config | None = None,
) -> Tensor:
    """The gradient of `qkv`.

    `one_pass` is the design, None for the one that `takes_one_pass` chooses; `config` goes with a design, None for that
    of `one_pass_config` or `backward_config`.
    """
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    grad_qkv = torch.empty_like(qkv)
    if not tokens:
        return grad_qkv
    device, pairs = describe(qkv.device), sequences.longest_first.shape[0] * heads
    biased, ranged = sequences.key_bias is not None, sequences.key_ranges is not None
    case = (device.arch, qkv.dtype, head_dim, sequences.max_seqlen)
    single = one_pass_config(*case)
    if one_pass is None:
        one_pass = takes_one_pass(single, pairs, sequences.max_seqlen, dropout is not None, device)
        if ranged:  # whose tiles two passes can leave out
            one_pass = one_pass and sequences.max_seqlen <= single.block
    config = config or (single if one_pass else backward_config(*case[:3], dropout is not None, biased, ranged))
    blocks = cdiv(sequences.max_seqlen, config.block)
    shared = (qkv, *_pointers(sequences, dropout), grad_qkv, tokens)
    rest = (scale, *_constants(device.arch, qkv.dtype, heads, head_dim, config, sequences))
    if one_pass:
        sums = None if blocks == 1 else torch.empty(tokens, heads * head_dim, dtype=torch.float32, device=qkv.device)
        # In float32, more values are kept at once without loops than there are registers for.
        one_tile = qkv.dtype != torch.float32 and sequences.max_seqlen <= min(config.block, config.step)
        tensors = (grad, out, statistics, sums)
        launch(_backward_kernel, (pairs,), *tensors, *shared, *rest, one_tile, num_warps=config.warps)
    else:
        numbers = torch.empty(heads, tokens, 4, dtype=torch.float32, device=qkv.device)  # for the second pass
        grid, interleaves = (pairs * blocks,), _interleaves(device.arch, sequences, dropout)
        queries = (grad, out, statistics, numbers, *shared, blocks, *rest, interleaves)
        launch(_backward_queries_kernel, grid, *queries, num_warps=config.warps)
        launch(_backward_keys_kernel, grid, grad, numbers, *shared, blocks, *rest, num_warps=config.warps)
    return grad_qkv


def _pointers(sequences: Sequences, dropout: Dropout | None) -> tuple[Tensor | int | float | None, ...]:
    columns, _, *rest = launch_arguments(dropout)
    return sequences.cu_seqlens, sequences.longest_first, sequences.key_bias, sequences.key_ranges, columns, *rest


def _constants(
    arch: str, dtype: torch.dtype, heads: int, head_dim: int, config: Config, sequences: Sequences
) -> tuple[int | bool | str, ...]:
    tiles = (config.block, config.step, config.stages)
    return heads, head_dim, _padded(head_dim), *tiles, sequences.contiguous, _precision(arch, dtype)


def _interleaves(arch: str, sequences: Sequences, dropout: Dropout | None) -> bool:
    """Whether tiles whose columns are keys have them in the order of `interleaved`.

    AMD's matrix products give a thread neighbours anyway (CDNA), or other columns (RDNA).
    """
    return dropout is not None and sequences.contiguous and not is_amd(arch)


@cache
def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _precision(arch: str, dtype: torch.dtype) -> str:
    """The precision of float32 matrix products: PyTorch's setting, except on AMD, where one architecture has TF32."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and not is_amd(arch)
    return "tf32" if tf32 else "ieee"


@triton.jit
def _work(cu_seqlens_ptr, longest_first_ptr, blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sequence, that sequence's first token and length, the first row of the program's block, and its head.

    Programs of the longest sequence come first. All heads of a block follow one another, because they share cache
    lines.
    """
    program = tl.program_id(0)
    sequence = tl.load(longest_first_ptr + program // HEADS // blocks).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    return sequence, start, length, program // HEADS % blocks * BLOCK, program % HEADS


@triton.jit
def _element_mask(row, length, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Which elements of the rows `row`, `[N, 1]`, lie in the sequence and in the head."""
    mask = row < length
    if HEAD_DIM < BLOCK_DIM:
        mask = mask & (tl.arange(0, BLOCK_DIM)[None, :] < HEAD_DIM)
    return mask


@triton.jit
def _load(
    ptr,
    row,
    length,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Loads the rows `row`, `[N, 1]`, of a head, with zeros beyond the sequence and the head; WHOLE: all rows exist."""
    elements = ptr + row * STRIDE + tl.arange(0, BLOCK_DIM)[None, :]
    if WHOLE and HEAD_DIM == BLOCK_DIM:
        return tl.load(elements)
    else:
        return tl.load(elements, mask=_element_mask(row, length, HEAD_DIM, BLOCK_DIM), other=0.0)


@triton.jit
def _store(ptr, row, length, x, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    elements = ptr + row * STRIDE + tl.arange(0, BLOCK_DIM)[None, :]
    tl.store(elements, x.to(ptr.dtype.element_ty), mask=_element_mask(row, length, HEAD_DIM, BLOCK_DIM))


@triton.jit
def _key_bias(key_bias_ptr, start, key, length):
    """The bias of the keys `key`, of any shape: -inf beyond the sequence."""
    return tl.load(key_bias_ptr + start + key, mask=key < length, other=float("-inf"))


@triton.jit
def _scaled(scores, scale, key_bias):
    """The scores, scaled, with the bias.

    It cannot be added to the product as it is: Triton makes `dot(a, b) + c` a product whose sums begin at c, and then
    each of their terms is rounded as coarsely as the bias.
    """
    return tl.fma(scores, scale, key_bias)


@triton.jit
def _factor(scale, key_bias_ptr):
    """The factor of the scores in exp2: `_scaled` has multiplied those with biases by the scale."""
    return LOG2_E if key_bias_ptr is not None else scale * LOG2_E


@triton.jit
def _key_range(key_ranges_ptr, start, query, length):
    """The first and the end of the keys that the queries `query`, of any shape, see; none beyond the sequence."""
    key_ranges_ptr += 2 * start.to(tl.int64)
    first = tl.load(key_ranges_ptr + 2 * query, mask=query < length, other=length)
    end = tl.load(key_ranges_ptr + 2 * query + 1, mask=query < length, other=0)
    return first, tl.minimum(end, length)


@triton.jit
def _is_seen(key, key_ranges_ptr, start, query, length):
    """Whether the queries `query`, `[N, 1]`, see the keys `key`, `[M, 1]`: `[M, N]`. A range is loaded at once."""
    key_range = key_ranges_ptr + 2 * start.to(tl.int64) + 2 * query + tl.arange(0, 2)[None, :]
    first, end = tl.split(tl.load(key_range, mask=query < length, other=0))
    return (key >= first[None, :]) & (key < tl.minimum(end, length)[None, :])


@triton.jit
def _seen_keys(key_range, STEP: tl.constexpr):
    """The first tile's first and the end of the keys that a program's queries see."""
    first, end = key_range
    return tl.maximum(tl.min(first), 0) // STEP * STEP, tl.max(end)


@triton.jit
def _seeing_queries(key_ranges_ptr, start, length, first_key, KEYS: tl.constexpr, STEP: tl.constexpr):
    """The first tile's first and the end of the queries that see any of the keys from `first_key` on."""
    least, most = length, length * 0
    for first_query in tl.range(0, length, STEP):
        query = first_query + tl.arange(0, STEP)
        first, end = _key_range(key_ranges_ptr, start, query, length)
        sees = (first < first_key + KEYS) & (end > first_key) & (first < end)
        least = tl.minimum(least, tl.min(tl.where(sees, query, length)))
        most = tl.maximum(most, tl.max(tl.where(sees, query + 1, 0)))
    return least // STEP * STEP, most


@triton.jit
def _dropout_mask(
    columns_ptr,
    start,
    length,
    sequence,
    head,
    seed,
    threshold,
    query,
    first_key,
    KEYS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    INTERLEAVED: tl.constexpr = False,
):
    """The dropout mask `[M, KEYS]` of the queries `query`, `[M, 1]`, and the keys from `first_key` on."""
    if CONTIGUOUS:
        groups = first_key // 4 + tl.arange(0, KEYS // 4)[None, :]
        return dropout_mask(seed, threshold, groups, query, sequence, head, INTERLEAVED)
    else:
        key = first_key + tl.arange(0, KEYS)[None, :]
        query_column = tl.load(columns_ptr + start + query, mask=query < length, other=0).to(tl.int32)
        key_column = tl.load(columns_ptr + start + key, mask=key < length, other=0).to(tl.int32)
        return dropout_mask_of_columns(seed, threshold, key_column, query_column, sequence, head)


@triton.jit
def _scores(
    query,
    key_ptr,
    first_key,
    keys,
    HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The scores of queries, -inf for keys that are not attended to; the keys from `first_key` on; and their values.

    Args:
        key_ptr: the first of these keys.
        WHOLE: all keys of the tile lie in the sequence.
    """
    key_bias_ptr, key_ranges_ptr, key_range, start, length, scale = keys
    BLOCK_DIM: tl.constexpr = query.shape[1]
    index = tl.arange(0, STEP)
    if INTERLEAVED:
        index = interleaved(index)
    row, left = index[:, None], length - first_key
    key = _load(key_ptr, row, left, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM, WHOLE)
    value = _load(key_ptr + HIDDEN, row, left, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM, WHOLE)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    column = first_key + index[None, :]
    if key_bias_ptr is not None:
        scores = _scaled(scores, scale, _key_bias(key_bias_ptr, start, column, length))
    if key_ranges_ptr is not None:
        scores = tl.where((column >= key_range[0]) & (column < key_range[1]), scores, float("-inf"))
    elif key_bias_ptr is None and not WHOLE:
        scores = tl.where(column < length, scores, float("-inf"))
    return scores, key, value


@triton.jit
def _forward_tile(
    sums,
    query,
    key_ptr,
    first_key,
    keys,
    factor,
    draw,
    HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The sums of a program's queries after the keys from `first_key` on."""
    offset, total, out = sums
    scores, _, value = _scores(query, key_ptr, first_key, keys, HIDDEN, HEAD_DIM, STEP, INTERLEAVED, PRECISION, WHOLE)
    less = tl.minimum(offset, tl.max(scores, axis=1)[:, None] * -factor)
    probabilities = tl.exp2(tl.fma(scores, factor, less))
    shrink = tl.exp2(less - offset)
    total = total * shrink + tl.sum(probabilities, axis=1)[:, None]
    if draw[0] is not None:
        dropout_mask = _dropout_mask(*draw, first_key, STEP, CONTIGUOUS, INTERLEAVED)
        # Zero, but not a constant: LLVM would select that after the conversion to 16 bits, half a register at a time.
        probabilities = tl.where(dropout_mask, probabilities, factor - factor)
    out = tl.dot(probabilities.to(value.dtype), value, acc=out * shrink, input_precision=PRECISION)
    return less, total, out


@triton.jit(do_not_specialize=["tokens", "blocks", "threshold"])
def _forward_kernel(
    qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM)
    cu_seqlens_ptr,  # (sequences + 1,)
    longest_first_ptr,  # (sequences,)
    key_bias_ptr,  # (tokens,), or None
    key_ranges_ptr,  # (tokens, 2), or None
    columns_ptr,  # (tokens,); None without dropout, like the seed
    seed_ptr,  # one element
    threshold,
    rescale,
    out_ptr,  # (tokens, HEADS · HEAD_DIM)
    statistics_ptr,  # (2, HEADS, tokens)
    tokens,
    blocks,  # blocks of the longest sequence
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    sequence, start, length, first, head = _work(cu_seqlens_ptr, longest_first_ptr, blocks, HEADS, BLOCK)
    if first >= length:
        return
    token = start.to(tl.int64)
    query_ptr = qkv_ptr + token * 3 * HIDDEN + head * HEAD_DIM
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0

    row = first + tl.arange(0, BLOCK)[:, None]
    query = _load(query_ptr, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
    sums = (
        tl.full([BLOCK, 1], LARGEST_FLOAT, tl.float32),  # not inf, to which masked scores would add up to NaN
        tl.zeros([BLOCK, 1], tl.float32),
        tl.zeros([BLOCK, BLOCK_DIM], tl.float32),
    )
    factor = _factor(scale, key_bias_ptr)
    begin, end = 0, length
    key_range = (begin, end)
    if key_ranges_ptr is not None:
        key_range = _key_range(key_ranges_ptr, start, row, length)
        begin, end = _seen_keys(key_range, STEP)
    keys = (key_bias_ptr, key_ranges_ptr, key_range, start, length, scale)
    draw = (columns_ptr, start, length, sequence, head, seed, threshold, row)
    # Without streaming, as in float32, no registers are to spare for a second copy of the tile: all tiles have masks.
    STREAMS: tl.constexpr = STAGES > 1
    whole = end // STEP * STEP if STREAMS else end
    first_key_ptr = query_ptr + HIDDEN
    if ONE_TILE:
        whole = 0
    else:
        key_ptr = first_key_ptr + begin * (3 * HIDDEN)  # carried along: its product by `first_key` costs instructions
        for first_key in tl.range(begin, whole, STEP, num_stages=STAGES):
            sums = _forward_tile(
                sums,
                query,
                key_ptr,
                first_key,
                keys,
                factor,
                draw,
                HIDDEN,
                HEAD_DIM,
                STEP,
                CONTIGUOUS,
                INTERLEAVED,
                PRECISION,
                WHOLE=STREAMS,
            )
            key_ptr += STEP * 3 * HIDDEN
    if whole < end:
        sums = _forward_tile(
            sums,
            query,
            first_key_ptr + whole * (3 * HIDDEN),
            whole,
            keys,
            factor,
            draw,
            HIDDEN,
            HEAD_DIM,
            STEP,
            CONTIGUOUS,
            INTERLEAVED,
            PRECISION,
            WHOLE=False,
        )

    offset, total, out = sums
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # a row without keys gives zeros
    out *= inverse if seed_ptr is None else inverse * rescale
    _store(out_ptr + token * HIDDEN + head * HEAD_DIM, row, length, out, HIDDEN, HEAD_DIM, BLOCK_DIM)
    statistics_ptr += head.to(tl.int64) * tokens + start + row
    tl.store(statistics_ptr, offset, mask=row < length)
    tl.store(statistics_ptr + HEADS * tokens, inverse, mask=row < length)


@triton.jit
def _load_number(ptr, row, length):
    """Loads a number for each of the queries `row`, of any shape; 0 beyond the sequence."""
    return tl.load(ptr + row, mask=row < length, other=0.0)


@triton.jit
def _delta(grad, out, rescale):
    """What the softmax subtracts from the gradients of a row's probabilities: the sum of grad · out, not rescaled.

    `rescale` is 0 where all is dropped, and then `out` is 0 too.
    """
    return tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1) / tl.maximum(rescale, 1.0)


@triton.jit
def _queries_tile(
    grad_query,
    query,
    grad,
    offset,
    delta,
    key_ptr,
    first_key,
    keys,
    factor,
    draw,
    HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The gradient of a program's queries, times the sum of their exponentials, with the keys from `first_key` on."""
    scores, key, value = _scores(query, key_ptr, first_key, keys, HIDDEN, HEAD_DIM, STEP, INTERLEAVED, PRECISION, WHOLE)
    exponentials = tl.exp2(tl.fma(scores, factor, offset))
    grad_probabilities = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    dropped = exponentials
    if draw[0] is not None:
        dropout_mask = _dropout_mask(*draw, first_key, STEP, CONTIGUOUS, INTERLEAVED)
        dropped = tl.where(dropout_mask, exponentials, 0.0)
    grad_scores = dropped * grad_probabilities - exponentials * delta
    return tl.dot(grad_scores.to(key.dtype), key, acc=grad_query, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "blocks", "threshold"])
def _backward_queries_kernel(
    grad_ptr,  # (tokens, HEADS · HEAD_DIM)
    out_ptr,  # (tokens, HEADS · HEAD_DIM)
    statistics_ptr,  # (2, HEADS, tokens)
    numbers_ptr,  # (HEADS, tokens, 4): offset, inverse, sum of grad · out, and an unused one, of each row, written here
    qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM)
    cu_seqlens_ptr,  # (sequences + 1,)
    longest_first_ptr,  # (sequences,)
    key_bias_ptr,  # (tokens,), or None
    key_ranges_ptr,  # (tokens, 2), or None
    columns_ptr,  # (tokens,); None without dropout, like the seed
    seed_ptr,  # one element
    threshold,
    rescale,
    grad_qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM): this kernel writes the queries' third
    tokens,
    blocks,  # blocks of the longest sequence
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    sequence, start, length, first, head = _work(cu_seqlens_ptr, longest_first_ptr, blocks, HEADS, BLOCK)
    if first >= length:
        return
    token = start.to(tl.int64)
    query_ptr = qkv_ptr + token * 3 * HIDDEN + head * HEAD_DIM
    out_offset = token * HIDDEN + head * HEAD_DIM
    row_offset = head.to(tl.int64) * tokens + start
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0

    row = first + tl.arange(0, BLOCK)[:, None]
    query = _load(query_ptr, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
    grad = _load(grad_ptr + out_offset, row, length, HIDDEN, HEAD_DIM, BLOCK_DIM)
    out = _load(out_ptr + out_offset, row, length, HIDDEN, HEAD_DIM, BLOCK_DIM)
    offset = _load_number(statistics_ptr + row_offset, row, length)
    inverse = _load_number(statistics_ptr + HEADS * tokens + row_offset, row, length)
    delta = _delta(grad, out, rescale)[:, None]
    numbers_ptr += 4 * (row_offset + row)
    tl.store(numbers_ptr, offset, mask=row < length)
    tl.store(numbers_ptr + 1, inverse, mask=row < length)
    tl.store(numbers_ptr + 2, delta, mask=row < length)

    grad_query = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    factor = _factor(scale, key_bias_ptr)
    begin, end = 0, length
    key_range = (begin, end)
    if key_ranges_ptr is not None:
        key_range = _key_range(key_ranges_ptr, start, row, length)
        begin, end = _seen_keys(key_range, STEP)
    keys = (key_bias_ptr, key_ranges_ptr, key_range, start, length, scale)
    draw = (columns_ptr, start, length, sequence, head, seed, threshold, row)
    whole = begin
    first_key_ptr = query_ptr + HIDDEN
    if STAGES > 1:  # see the forward
        whole = end // STEP * STEP
        key_ptr = first_key_ptr + begin * (3 * HIDDEN)
        for first_key in tl.range(begin, whole, STEP, num_stages=STAGES):
            grad_query = _queries_tile(
                grad_query,
                query,
                grad,
                offset,
                delta,
                key_ptr,
                first_key,
                keys,
                factor,
                draw,
                HIDDEN,
                HEAD_DIM,
                STEP,
                CONTIGUOUS,
                INTERLEAVED,
                PRECISION,
                WHOLE=True,
            )
            key_ptr += STEP * 3 * HIDDEN
    for first_key in tl.range(whole, end, STEP, num_stages=1):  # an `if` would cost registers
        grad_query = _queries_tile(
            grad_query,
            query,
            grad,
            offset,
            delta,
            first_key_ptr + first_key * (3 * HIDDEN),
            first_key,
            keys,
            factor,
            draw,
            HIDDEN,
            HEAD_DIM,
            STEP,
            CONTIGUOUS,
            INTERLEAVED,
            PRECISION,
            WHOLE=False,
        )

    grad_query *= scale * rescale * inverse
    grad_query_ptr = grad_qkv_ptr + token * 3 * HIDDEN + head * HEAD_DIM
    _store(grad_query_ptr, row, length, grad_query, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _load_numbers(ptr, row, length, WHOLE: tl.constexpr):
    """The offsets, inverses and deltas of the queries `row`, `[N, 1]`, each `[1, N]`; 0 beyond the sequence.

    A row's numbers are loaded at once: three loads of `[1, N]` become one of 4 bytes for every column of a thread.
    """
    numbers = ptr + 4 * row + tl.arange(0, 4)[None, :]
    numbers = tl.load(numbers) if WHOLE else tl.load(numbers, mask=row < length, other=0.0)
    even, odd = tl.split(tl.reshape(numbers, [row.shape[0], 2, 2]))
    offset, delta = tl.split(even)
    inverse, _ = tl.split(odd)
    return offset[None, :], inverse[None, :], delta[None, :]


@triton.jit
def _keys_tile(
    sums,
    keys,
    first_key,
    first_query,
    queries,
    length,
    factor,
    draw,
    HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The gradients of a program's keys and values with the queries from `first_query` on.

    Keys beyond the sequence need no mask, as nothing is stored of them; queries do not, as their statistics are 0.
    """
    grad_key, grad_value = sums
    key, value, key_bias_ptr, key_bias, key_ranges_ptr, start, scale = keys
    query_ptr, grad_ptr, numbers_ptr = queries
    BLOCK: tl.constexpr = key.shape[0]
    BLOCK_DIM: tl.constexpr = key.shape[1]
    row = first_query + tl.arange(0, STEP)[:, None]
    query = _load(query_ptr, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM, WHOLE)
    grad = _load(grad_ptr, row, length, HIDDEN, HEAD_DIM, BLOCK_DIM, WHOLE)
    offset, inverse, delta = _load_numbers(numbers_ptr, row, length, WHOLE)
    # Keys by queries: the transpose of the forward's tile.
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    if key_bias_ptr is not None:
        scores = _scaled(scores, scale, key_bias)
    probabilities = tl.exp2(tl.fma(scores, factor, offset)) * inverse
    if key_ranges_ptr is not None:
        column = first_key + tl.arange(0, BLOCK)[:, None]
        probabilities = tl.where(_is_seen(column, key_ranges_ptr, start, row, length), probabilities, 0.0)
    grad_probabilities = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    dropped = probabilities
    if draw[0] is not None:
        dropout_mask = tl.trans(_dropout_mask(*draw, row, first_key, BLOCK, CONTIGUOUS))
        dropped = tl.where(dropout_mask, probabilities, 0.0)
    grad_value = tl.dot(dropped.to(grad.dtype), grad, acc=grad_value, input_precision=PRECISION)
    grad_scores = dropped * grad_probabilities - probabilities * delta
    grad_key = tl.dot(grad_scores.to(query.dtype), query, acc=grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["tokens", "blocks", "threshold"])
def _backward_keys_kernel(
    grad_ptr,  # (tokens, HEADS · HEAD_DIM)
    numbers_ptr,  # (HEADS, tokens, 4)
    qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM)
    cu_seqlens_ptr,  # (sequences + 1,)
    longest_first_ptr,  # (sequences,)
    key_bias_ptr,  # (tokens,), or None
    key_ranges_ptr,  # (tokens, 2), or None
    columns_ptr,  # (tokens,); None without dropout, like the seed
    seed_ptr,  # one element
    threshold,
    rescale,
    grad_qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM): this kernel writes the keys' and the values' thirds
    tokens,
    blocks,  # blocks of the longest sequence
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    sequence, start, length, first, head = _work(cu_seqlens_ptr, longest_first_ptr, blocks, HEADS, BLOCK)
    if first >= length:
        return
    token = start.to(tl.int64)
    query_ptr = qkv_ptr + token * 3 * HIDDEN + head * HEAD_DIM
    grad_ptr += token * HIDDEN + head * HEAD_DIM
    row_offset = head.to(tl.int64) * tokens + start
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0

    row = first + tl.arange(0, BLOCK)[:, None]
    key = _load(query_ptr + HIDDEN, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
    value = _load(query_ptr + 2 * HIDDEN, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
    key_bias = 0.0
    if key_bias_ptr is not None:
        key_bias = _key_bias(key_bias_ptr, start, row, length)
    sums = (tl.zeros([BLOCK, BLOCK_DIM], tl.float32), tl.zeros([BLOCK, BLOCK_DIM], tl.float32))
    keys = (key, value, key_bias_ptr, key_bias, key_ranges_ptr, start, scale)
    queries = (query_ptr, grad_ptr, numbers_ptr + 4 * row_offset)
    draw = (columns_ptr, start, length, sequence, head, seed, threshold)
    factor = _factor(scale, key_bias_ptr)
    begin, end = 0, length
    if key_ranges_ptr is not None:
        begin, end = _seeing_queries(key_ranges_ptr, start, length, first, BLOCK, STEP)
    whole = begin
    if STAGES > 1:  # see the forward
        whole = end // STEP * STEP
        for first_query in tl.range(begin, whole, STEP, num_stages=STAGES):
            sums = _keys_tile(
                sums,
                keys,
                first,
                first_query,
                queries,
                length,
                factor,
                draw,
                HIDDEN,
                HEAD_DIM,
                STEP,
                CONTIGUOUS,
                PRECISION,
                WHOLE=True,
            )
    for first_query in tl.range(whole, end, STEP, num_stages=1):  # an `if` would cost registers
        sums = _keys_tile(
            sums,
            keys,
            first,
            first_query,
            queries,
            length,
            factor,
            draw,
            HIDDEN,
            HEAD_DIM,
            STEP,
            CONTIGUOUS,
            PRECISION,
            WHOLE=False,
        )

    grad_key, grad_value = sums
    grad_key_ptr = grad_qkv_ptr + token * 3 * HIDDEN + HIDDEN + head * HEAD_DIM
    _store(grad_key_ptr, row, length, grad_key * (scale * rescale), 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
    _store(grad_key_ptr + HIDDEN, row, length, grad_value * rescale, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def _backward_kernel(
    grad_ptr,  # (tokens, HEADS · HEAD_DIM)
    out_ptr,  # (tokens, HEADS · HEAD_DIM)
    statistics_ptr,  # (2, HEADS, tokens)
    sums_ptr,  # (tokens, HEADS · HEAD_DIM) float32, sums for the queries' gradients; None if a block holds all keys
    qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM)
    cu_seqlens_ptr,  # (sequences + 1,)
    longest_first_ptr,  # (sequences,)
    key_bias_ptr,  # (tokens,), or None
    key_ranges_ptr,  # (tokens, 2), or None
    columns_ptr,  # (tokens,); None without dropout, like the seed
    seed_ptr,  # one element
    threshold,
    rescale,
    grad_qkv_ptr,  # (tokens, 3 · HEADS · HEAD_DIM)
    tokens,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    HIDDEN: tl.constexpr = HEADS * HEAD_DIM
    sequence, start, length, _, head = _work(cu_seqlens_ptr, longest_first_ptr, 1, HEADS, BLOCK)
    token = start.to(tl.int64)
    query_ptr = qkv_ptr + token * 3 * HIDDEN + head * HEAD_DIM
    grad_query_ptr = grad_qkv_ptr + token * 3 * HIDDEN + head * HEAD_DIM
    out_offset = token * HIDDEN + head * HEAD_DIM
    statistics_ptr += head.to(tl.int64) * tokens + start
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    factor = _factor(scale, key_bias_ptr)

    # A loop that is known to have one iteration is unrolled, and its sums need no registers of their own.
    for first in tl.range(0, BLOCK if ONE_TILE else length, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None]
        key = _load(query_ptr + HIDDEN, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
        value = _load(query_ptr + 2 * HIDDEN, row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
        if key_bias_ptr is not None:
            key_bias = _key_bias(key_bias_ptr, start, row, length)
        grad_key = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
        grad_value = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
        for first_query in tl.range(0, STEP if ONE_TILE else length, STEP, num_stages=STAGES):
            query_row = first_query + tl.arange(0, STEP)[:, None]
            query = _load(query_ptr, query_row, length, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
            grad = _load(grad_ptr + out_offset, query_row, length, HIDDEN, HEAD_DIM, BLOCK_DIM)
            out = _load(out_ptr + out_offset, query_row, length, HIDDEN, HEAD_DIM, BLOCK_DIM)
            column = first_query + tl.arange(0, STEP)[None, :]
            delta = _delta(grad, out, rescale)[None, :]
            if seed_ptr is not None:  # drawn here rather than between the products, so that all fits into registers
                draw = (columns_ptr, start, length, sequence, head, seed, threshold)
                dropout_mask = tl.trans(_dropout_mask(*draw, query_row, first, BLOCK, CONTIGUOUS))
            offset = _load_number(statistics_ptr, column, length)
            inverse = _load_number(statistics_ptr + HEADS * tokens, column, length)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            if key_bias_ptr is not None:
                scores = _scaled(scores, scale, key_bias)
            probabilities = tl.exp2(tl.fma(scores, factor, offset)) * inverse
            if key_ranges_ptr is not None:
                seen = _is_seen(row, key_ranges_ptr, start, query_row, length)
                probabilities = tl.where(seen, probabilities, 0.0)
            elif key_bias_ptr is None:
                probabilities = tl.where(row < length, probabilities, 0.0)
            dropped = probabilities
            if seed_ptr is not None:
                dropped = tl.where(dropout_mask, probabilities, 0.0)
            grad_probabilities = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            grad_value = tl.dot(dropped.to(grad.dtype), grad, acc=grad_value, input_precision=PRECISION)
            grad_scores = (dropped * grad_probabilities - probabilities * delta).to(query.dtype)
            grad_key = tl.dot(grad_scores, query, acc=grad_key, input_precision=PRECISION)
            grad_query = tl.dot(tl.trans(grad_scores), key, input_precision=PRECISION)
            if sums_ptr is not None:
                if first > 0:
                    grad_query += _load(sums_ptr + out_offset, query_row, length, HIDDEN, HEAD_DIM, BLOCK_DIM)
                if first + BLOCK < length:
                    _store(sums_ptr + out_offset, query_row, length, grad_query, HIDDEN, HEAD_DIM, BLOCK_DIM)
            if first + BLOCK >= length:
                _store(
                    grad_query_ptr, query_row, length, grad_query * (scale * rescale), 3 * HIDDEN, HEAD_DIM, BLOCK_DIM
                )
        _store(grad_query_ptr + HIDDEN, row, length, grad_key * (scale * rescale), 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
        _store(grad_query_ptr + 2 * HIDDEN, row, length, grad_value * rescale, 3 * HIDDEN, HEAD_DIM, BLOCK_DIM)
        if sums_ptr is not None:
            tl.debug_barrier()  # the next block's threads read sums that other threads have stored
