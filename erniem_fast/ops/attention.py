"""`attention`: softmax(Q Kᵀ · scale) with dropout, times V, within each sequence of a batch."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import modes, reference
from ..batch import TokenBatch
from ..dropout import keep_mask
from ..native import attention as native
from .implementation import IMPLEMENTATIONS, Implementation, call, choose, differentiable, once_differentiable, run
from .native import implementation as native_implementation
from .triton import implementation as triton_implementation

# Queries, keys and values side by side; or apart, in graphs that are made for elsewhere.
QKV = Tensor | Sequence[Tensor]


def attention(
    qkv: QKV, batch: TokenBatch, heads: int, scale: float, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ · scale) with dropout, times V, within each sequence and over the keys that the batch keeps.

    A sequence without keys gives zeros, forward and backward.

    Args:
        qkv: `(tokens, 3 · heads · head_dim)`, all queries, then all keys, then all values of a token; where
            `modes.is_exported`, also the three apart.
        batch: sequences, key mask, and the tokens' coordinates for dropout.
        heads: number of heads.
        scale: of the scores, positive; 1 / √head_dim in ERNIE-M (Vaswani et al., arXiv 1706.03762, section 3.2.1).
        p: probability of dropping an attention probability.
        seed: int64, one element; None for no dropout.

    Returns:
        `(tokens, heads · head_dim)` in the dtype of `qkv`.

    Raises:
        ValueError: the features of `qkv` are no three times `heads` of a size, or `scale` is not positive.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype.
    """
    if modes.is_exported():
        grid = _grid_of(batch)
        if seed is None:
            return _sdpa_on_grid(qkv, grid, heads, scale)
        return _explicit(qkv, grid, batch.columns, heads, scale, p, seed)[0]
    if qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} features, which {heads} heads cannot divide into queries, keys and values of one "
            f"size; heads must be the number that the weights of q_proj, k_proj and v_proj hold."
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}; for a negative one, negate the queries.")
    name = choose("attention", qkv.device, qkv.dtype, qkv.shape[1] // (3 * heads))
    order = (batch.longest_first, batch.contiguous)
    where = (batch.cu_seqlens, batch.max_seqlen, batch.columns, batch.sequences, batch.key_mask)
    inputs = (qkv, *order, *where, heads, scale, p, seed)
    return call("attention", name, _forward, differentiable(qkv), *inputs)[0]


def attention_with_probabilities(
    qkv: QKV,
    batch: TokenBatch,
    heads: int,
    scale: float,
    scores_bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` in plain PyTorch, for callers that want the probabilities or add their own bias to the scores.

    Args:
        qkv, batch, heads, scale, p, seed: as in `attention`.
        scores_bias: added to the scaled scores, broadcastable to `(sequences, heads, queries, keys)`; -inf where a key
            is not to be attended to. Only in the padded layout, where queries and keys are columns of the grid.

    Returns:
        `(tokens, heads · head_dim)`, and the probabilities after dropout, `(sequences, heads, max_seqlen, max_seqlen)`
        by the tokens' index in their sequence; of no meaning where there is no token.
    """
    return _explicit(qkv, _grid_of(batch), batch.columns, heads, scale, p, seed, scores_bias)


@torch.library.custom_op("erniem_fast::attention", mutates_args=())
def _forward(
    qkv: Tensor,
    longest_first: Tensor,
    contiguous: bool,
    cu_seqlens: Tensor,
    max_seqlen: int,
    columns: Tensor,
    sequences: Tensor,
    key_mask: Tensor | None,
    heads: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The result, and what else the implementation saves for its backward, empty where that is nothing."""
    where = (longest_first, contiguous, cu_seqlens, max_seqlen, columns, sequences, key_mask)
    inputs = (qkv, *where, heads, scale, p, seed)
    return run("attention", implementation, "forward", *inputs)


@torch.library.custom_op("erniem_fast::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    saved: Tensor,
    qkv: Tensor,
    longest_first: Tensor,
    contiguous: bool,
    cu_seqlens: Tensor,
    max_seqlen: int,
    columns: Tensor,
    sequences: Tensor,
    key_mask: Tensor | None,
    heads: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    implementation: str,
) -> Tensor:
    """Gradient of qkv."""
    where = (longest_first, contiguous, cu_seqlens, max_seqlen, columns, sequences, key_mask)
    inputs = (grad, out, saved, qkv, *where, heads, scale, p, seed)
    return run("attention", implementation, "backward", *inputs)


@_forward.register_fake
def _(qkv, longest_first, contiguous, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, *rest):
    *_, implementation = rest
    statistics = (heads, qkv.shape[0], 2) if implementation == "triton" else 0
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), qkv.new_empty(statistics, dtype=torch.float32)


@_backward.register_fake
def _(grad, out, saved, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # what is only saved has no gradient: no zeros need be written for it
    qkv, longest_first, ctx.contiguous, cu_seqlens, ctx.max_seqlen, columns, sequences, key_mask, *rest = inputs
    ctx.heads, ctx.scale, ctx.p, seed, ctx.implementation = rest
    ctx.save_for_backward(*output, qkv, longest_first, cu_seqlens, columns, sequences, key_mask, seed)


def _autograd(ctx, grad, _):
    out, saved, qkv, longest_first, cu_seqlens, columns, sequences, key_mask, seed = ctx.saved_tensors
    where = (longest_first, ctx.contiguous, cu_seqlens, ctx.max_seqlen, columns, sequences, key_mask)
    of_qkv = _backward(grad, out, saved, qkv, *where, ctx.heads, ctx.scale, ctx.p, seed, ctx.implementation)
    return of_qkv, *[None] * 12


_forward.register_autograd(_autograd, setup_context=_setup_context)
once_differentiable(_backward)


def _forward_reference(qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed):
    return reference.attention(qkv, cu_seqlens, columns, key_mask, heads, scale, p, seed)


def _backward_reference(grad, qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed):
    return reference.attention_backward(grad, qkv, cu_seqlens, columns, key_mask, heads, scale, p, seed)


def _forward_torch(qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed):
    if seed is None and qkv.device.type == "cpu":
        return _sdpa_by_sequence(qkv, cu_seqlens, key_mask, heads, scale)
    grid = _grid(cu_seqlens, max_seqlen, sequences, key_mask)
    if seed is None:
        return _sdpa_on_grid(qkv, grid, heads, scale)
    return _explicit(qkv, grid, columns, heads, scale, p, seed)[0]


def _backward_torch(grad, qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed):
    grid = _grid(cu_seqlens, max_seqlen, sequences, key_mask)
    of_out = _on_grid(grad, grid, heads)
    keep = None if seed is None else _keep_mask(seed, p, grid, columns, heads)
    grads = reference.attend_backward(of_out, *_apart(qkv, grid, heads), scale, grid.kept[:, None, None, :], keep, p)
    return torch.cat([_off_grid(each, grid) for each in grads], dim=1)


def _sdpa_by_sequence(qkv, cu_seqlens, key_mask, heads, scale):
    """A call for every run of equally long sequences, on views of qkv: no padding, and no copies before the last."""
    qkv = qkv.view(-1, 3, heads, qkv.shape[1] // (3 * heads))
    outputs = [qkv.new_empty(0, qkv.shape[2] * qkv.shape[3])]
    start = 0
    for length, run_of_sequences in groupby(cu_seqlens.diff().tolist()):
        count = len(list(run_of_sequences))
        end = start + count * length
        query, key, value = qkv[start:end].unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        mask = None if key_mask is None else key_mask[start:end].view(count, 1, 1, length)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, qkv.shape[2] * qkv.shape[3]))
        start = end
    return outputs[1] if len(outputs) == 2 else torch.cat(outputs)


class _Grid(NamedTuple):
    """Where tokens stand in a grid with a row for each sequence.

    Attributes:
        shape: `(sequences, max_seqlen)`.
        place: int64 `(tokens,)`, each token's place in the flattened grid; None where the tokens fill it in order.
        kept: bool, of that shape, the places that are attended to; None where all are.
    """

    shape: tuple[int, int]
    place: Tensor | None
    kept: Tensor | None


def _grid(cu_seqlens, max_seqlen, sequences, key_mask):
    """The grid of sequences of any lengths."""
    shape = (cu_seqlens.shape[0] - 1, max_seqlen)
    token = torch.arange(sequences.shape[0], device=sequences.device)
    place = sequences * max_seqlen + token - cu_seqlens.long()[sequences]
    kept = sequences.new_zeros(shape, dtype=torch.bool)
    real = torch.ones_like(sequences, dtype=torch.bool) if key_mask is None else key_mask
    return _Grid(shape, place, kept.flatten().index_copy(0, place, real).view_as(kept))


def _grid_of(batch):
    """The batch's grid: its own where the tokens fill it."""
    if not batch.fills_grid:
        return _grid(batch.cu_seqlens, batch.max_seqlen, batch.sequences, batch.key_mask)
    return _Grid(batch.grid, None, None if batch.key_mask is None else batch.key_mask.view(batch.grid))


def _sdpa_on_grid(qkv, grid, heads, scale):
    """One call for all sequences, padded to the longest: few launches, where a launch is what costs.

    Runtimes disagree about a sequence without keys: NaN, zeros, or the mean of all values. Here it attends to all of
    its places, and its result is set to zero.
    """
    query, key, value = _apart(qkv, grid, heads)
    if grid.kept is None:
        return _off_grid(F.scaled_dot_product_attention(query, key, value, scale=scale), grid)
    kept = grid.kept[:, None, None, :]
    has_keys = kept.any(-1, keepdim=True)
    bias = query.new_zeros(()).masked_fill(kept != has_keys, torch.finfo(query.dtype).min)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return _off_grid(torch.where(has_keys, out, 0.0), grid)


def _explicit(qkv, grid, columns, heads, scale, p=0.0, seed=None, scores_bias=None):
    """The formula with all probabilities at hand: what dropout and a caller's own bias need."""
    kept = None if grid.kept is None else grid.kept[:, None, None, :]
    keep = None if seed is None else _keep_mask(seed, p, grid, columns, heads)
    out, probabilities = reference.attend(*_apart(qkv, grid, heads), scale, kept, keep, p, scores_bias)
    return _off_grid(out, grid), probabilities


def _apart(qkv, grid, heads):
    """Queries, keys and values, `(sequences, heads, max_seqlen, head_dim)` each, zeros where there is no token."""
    if isinstance(qkv, Tensor):
        return _on_grid(qkv, grid, 3 * heads).chunk(3, dim=1)
    return [_on_grid(each, grid, heads) for each in qkv]


def _on_grid(x, grid, heads):
    """`(tokens, heads · head_dim)` to `(sequences, heads, max_seqlen, head_dim)`, zeros where there is no token."""
    if grid.place is not None:
        # Not grid.numel(), which torch.jit.trace takes as a constant.
        x = x.new_zeros(math.prod(grid.shape), x.shape[1]).index_copy(0, grid.place, x)
    return x.view(*grid.shape, heads, x.shape[1] // heads).transpose(1, 2)


def _off_grid(out, grid):
    """`(sequences, heads, max_seqlen, head_dim)` to `(tokens, heads · head_dim)`."""
    out = out.transpose(1, 2).reshape(math.prod(grid.shape), out.shape[1] * out.shape[3])
    return out if grid.place is None else out.index_select(0, grid.place)


def _keep_mask(seed, p, grid, columns, heads):
    """The dropout mask of `(sequences, heads, max_seqlen, max_seqlen)` probabilities."""
    sequence = torch.arange(grid.shape[0], device=seed.device)[:, None, None]
    head = torch.arange(heads, device=seed.device)[None, :, None]
    if grid.place is None:
        return keep_mask(seed, p, grid.shape[1], columns.view(grid.shape)[:, None, :], sequence, head)
    column = columns.new_zeros(math.prod(grid.shape)).index_copy(0, grid.place, columns).view(grid.shape)
    width = int(columns.max()) + 1 if len(columns) else 0
    keep = keep_mask(seed, p, width, column[:, None, :], sequence, head)
    return keep.gather(-1, column[:, None, None, :].expand(*keep.shape[:-1], grid.shape[1]))


def _stateless(forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Implementation:
    """An implementation that saves nothing beyond its inputs and takes the sequences in any order."""

    def run_forward(qkv, longest_first, contiguous, *rest):
        return forward(qkv, *rest), qkv.new_empty(0, dtype=torch.float32)

    def run_backward(grad, out, saved, qkv, longest_first, contiguous, *rest):
        return backward(grad, qkv, *rest)

    return Implementation(run_forward, run_backward)


IMPLEMENTATIONS["attention"] = {
    # Below 8.0 Triton has no tensor-core products, and the tiles do not fit (seen with Triton 3.6 and 3.9).
    "triton": triton_implementation("attention", largest=256, capability=(8, 0)),
    "native": native_implementation(native.forward, native.backward, ("cpu",)),
    "torch": _stateless(_forward_torch, _backward_torch),
    "reference": _stateless(_forward_reference, _backward_reference),
}
