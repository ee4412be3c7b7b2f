"""Attention by PyTorch's own operators: the `torch` implementation, exported graphs, attention with probabilities."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..batch import Sequences, TokenBatch
from ..dropout import Dropout, dropout_mask

# Queries, keys and values side by side in one tensor; in exported graphs also three tensors.
QKV = Tensor | Sequence[Tensor]


def forward(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None) -> Tensor:
    if dropout is None and qkv.device.type == "cpu":
        return _sdpa_by_sequence(qkv, sequences, heads, scale)
    grid = _grid_of_sequences(sequences)
    if dropout is None:
        return _sdpa_on_grid(qkv, grid, heads, scale)
    return _explicit(qkv, grid, heads, scale, dropout)[0]


def backward(
    grad: Tensor, qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None
) -> Tensor:
    grid = _grid_of_sequences(sequences)
    mask, p = _dropout_mask(dropout, grid, heads)
    qkv_on_grid = _apart(qkv, grid, heads)
    grads = reference.attend_backward(_on_grid(grad, grid, heads), *qkv_on_grid, scale, grid.bias, mask, p)
    return torch.cat([_off_grid(grad_on_grid, grid) for grad_on_grid in grads], dim=1)


def forward_exported(qkv: QKV, batch: TokenBatch, heads: int, scale: float, dropout: Dropout | None) -> Tensor:
    """`forward` for exported graphs, which may not depend on values of the example's tensors."""
    grid = _grid_of(batch)
    if dropout is None:
        return _sdpa_on_grid(qkv, grid, heads, scale)
    return _explicit(qkv, grid, heads, scale, dropout)[0]


def forward_with_probabilities(
    qkv: QKV, batch: TokenBatch, heads: int, scale: float, scores_bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """See `ops.attention_with_probabilities`."""
    return _explicit(qkv, _grid_of(batch), heads, scale, dropout, scores_bias)


def _sdpa_by_sequence(qkv: Tensor, sequences: Sequences, heads: int, scale: float) -> Tensor:
    """One call for each run of equally long sequences, on views of qkv: no padding, and no copy of qkv."""
    qkv = qkv.view(-1, 3, heads, qkv.shape[1] // (3 * heads))
    outputs = [qkv.new_empty(0, qkv.shape[2] * qkv.shape[3])]
    start = 0
    for length, run_of_sequences in groupby(sequences.cu_seqlens.diff().tolist()):
        count = len(list(run_of_sequences))
        end = start + count * length
        query, key, value = qkv[start:end].unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        parts = (sequences.key_bias, sequences.key_ranges)
        parts = (None if each is None else each[start:end].view(count, 1, length, *each.shape[1:]) for each in parts)
        bias = reference.scores_bias(*parts)
        bias = bias if bias is None else bias.to(reference.wide(qkv.dtype))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, qkv.shape[2] * qkv.shape[3]))
        start = end
    return outputs[1] if len(outputs) == 2 else torch.cat(outputs)


class _Grid(NamedTuple):
    """Where tokens stand in a grid with one row for each sequence.

    Attributes:
        shape: `(sequences, max_seqlen)`.
        place: int64 `(tokens,)`, each token's place in the flattened grid; None if the tokens fill it in order.
        bias: float32 `(sequences, 1, 1 or max_seqlen, max_seqlen)`, added to the scores; -inf for keys that are not
            attended to. None for no bias.
    """

    shape: tuple[int, int]
    place: Tensor | None
    bias: Tensor | None


def _grid_of_sequences(sequences: Sequences) -> _Grid:
    """The grid of sequences of any lengths."""
    sequence_ids, max_seqlen = sequences.sequence_ids, sequences.max_seqlen
    shape = (sequences.cu_seqlens.shape[0] - 1, max_seqlen)
    place = sequence_ids * max_seqlen + sequences.indices()
    key_bias, key_ranges = sequences.key_bias, sequences.key_ranges
    if key_bias is None:
        key_bias = torch.zeros_like(place, dtype=torch.float32)
    nowhere = key_bias.new_full((math.prod(shape),), -torch.inf)
    key_bias = nowhere.index_copy(0, place, key_bias).view(shape[0], 1, shape[1])
    if key_ranges is not None:
        nothing = key_ranges.new_zeros(math.prod(shape), 2)
        key_ranges = nothing.index_copy(0, place, key_ranges).view(shape[0], 1, shape[1], 2)
    return _Grid(shape, place, reference.scores_bias(key_bias, key_ranges))


def _grid_of(batch: TokenBatch) -> _Grid:
    """The batch's own grid if the tokens fill it, otherwise the grid of its sequences."""
    if not batch.fills_grid:
        return _grid_of_sequences(batch.sequences)
    (rows, columns), parts = batch.grid, (batch.sequences.key_bias, batch.sequences.key_ranges)
    parts = (None if each is None else each.view(rows, 1, columns, *each.shape[1:]) for each in parts)
    return _Grid(batch.grid, None, reference.scores_bias(*parts))


def _sdpa_on_grid(qkv: QKV, grid: _Grid, heads: int, scale: float) -> Tensor:
    """One call for all sequences, padded to the longest: few launches, for devices where launches dominate the time.

    For a query without keys, some runtimes give NaN, some zeros, some the mean of all values. Here such a query attends
    to all places of its sequence, and its result is then set to zero.
    """
    query, key, value = parts = _apart(qkv, grid, heads)
    bias = grid.bias
    if bias is None:
        return _off_grid(F.scaled_dot_product_attention(query, key, value, scale=scale), grid)
    has_keys = (bias > -torch.inf).any(-1, keepdim=True)
    # On GPUs the bias must have the dtype of the queries, in which 16 bits are too few.
    dtype = reference.wide(query.dtype)
    bias = torch.where(has_keys, bias, 0.0).clamp(min=torch.finfo(dtype).min).to(dtype)
    out = F.scaled_dot_product_attention(*(part.to(dtype) for part in parts), attn_mask=bias, scale=scale)
    return _off_grid(torch.where(has_keys, out, 0.0).to(value.dtype), grid)


def _explicit(
    qkv: QKV,
    grid: _Grid,
    heads: int,
    scale: float,
    dropout: Dropout | None,
    scores_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula, with all probabilities in memory, which dropout and a caller's own bias need."""
    mask, p = _dropout_mask(dropout, grid, heads)
    bias = grid.bias if scores_bias is None else scores_bias
    if grid.bias is not None and scores_bias is not None:
        bias = grid.bias + scores_bias
    out, probabilities = reference.attend(*_apart(qkv, grid, heads), scale, bias, mask, p)
    return _off_grid(out, grid), probabilities


def _apart(qkv: QKV, grid: _Grid, heads: int) -> Sequence[Tensor]:
    """Queries, keys and values, `(sequences, heads, max_seqlen, head_dim)` each, zeros where there is no token."""
    if isinstance(qkv, Tensor):
        return _on_grid(qkv, grid, 3 * heads).chunk(3, dim=1)
    return [_on_grid(projected, grid, heads) for projected in qkv]


def _on_grid(x: Tensor, grid: _Grid, heads: int) -> Tensor:
    """`(tokens, heads · head_dim)` to `(sequences, heads, max_seqlen, head_dim)`, zeros where there is no token."""
    if grid.place is not None:
        # A tensor's numel() would be a constant in the graphs of torch.jit.trace; the product of a shape is not.
        x = x.new_zeros(math.prod(grid.shape), x.shape[1]).index_copy(0, grid.place, x)
    return x.view(*grid.shape, heads, x.shape[1] // heads).transpose(1, 2)


def _off_grid(out: Tensor, grid: _Grid) -> Tensor:
    """`(sequences, heads, max_seqlen, head_dim)` to `(tokens, heads · head_dim)`."""
    out = out.transpose(1, 2).reshape(math.prod(grid.shape), out.shape[1] * out.shape[3])
    return out if grid.place is None else out.index_select(0, grid.place)


def _dropout_mask(dropout: Dropout | None, grid: _Grid, heads: int) -> tuple[Tensor | None, float]:
    """The dropout mask of the probabilities, `(sequences, heads, max_seqlen, max_seqlen)`, and the rate."""
    if dropout is None:
        return None, 0.0
    p, seed, columns, _ = dropout
    sequence = torch.arange(grid.shape[0], device=seed.device)[:, None, None]
    head = torch.arange(heads, device=seed.device)[None, :, None]
    if grid.place is None:
        return dropout_mask(seed, p, grid.shape[1], columns.view(grid.shape)[:, None, :], sequence, head), p
    column = columns.new_zeros(math.prod(grid.shape)).index_copy(0, grid.place, columns).view(grid.shape)
    width = int(columns.max()) + 1 if len(columns) else 0
    mask = dropout_mask(seed, p, width, column[:, None, :], sequence, head)
    return mask.gather(-1, column[:, None, None, :].expand(*mask.shape[:-1], grid.shape[1])), p
