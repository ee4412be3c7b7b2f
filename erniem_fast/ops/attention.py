"""`attention`: softmax(Q Kᵀ · scale) with dropout, times V, within each sequence of a batch."""

import math
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..batch import TokenBatch
from ..dropout import keep_mask
from .implementation import IMPLEMENTATIONS, Implementation, call, choose, differentiable, once_differentiable, run
from .native_encoder import ATTENTION
from .triton import implementation as triton_implementation


def attention(
    qkv: Tensor, batch: TokenBatch, heads: int, scale: float, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ · scale) with dropout, times V, within each sequence and over the keys that the batch keeps.

    A sequence without keys gives zeros, forward and backward.

    Args:
        qkv: `(tokens, 3 · heads · head_dim)`, all queries, then all keys, then all values of a token.
        batch: sequences, key mask, and the tokens' coordinates for dropout.
        heads: number of heads.
        scale: of the scores, 1 / √head_dim in ERNIE-M (Vaswani et al., arXiv 1706.03762, section 3.2.1).
        p: probability of dropping an attention probability.
        seed: int64, one element; None for no dropout.

    Returns:
        `(tokens, heads · head_dim)` in the dtype of `qkv`.

    Raises:
        ValueError: the features of `qkv` are no three times `heads` of a size.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype.
    """
    if qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} features, which {heads} heads cannot divide into queries, keys and values of one "
            f"size; heads must be the number that the weights of q_proj, k_proj and v_proj hold."
        )
    name = choose("attention", qkv.device, qkv.dtype, qkv.shape[1] // (3 * heads))
    order = (batch.longest_first, batch.contiguous)
    where = (batch.cu_seqlens, batch.max_seqlen, batch.columns, batch.sequences, batch.key_mask)
    inputs = (qkv, *order, *where, heads, scale, p, seed)
    return call("attention", name, _forward, differentiable(qkv), *inputs)[0]


def attention_with_probabilities(
    qkv: Tensor,
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
    where = (batch.cu_seqlens, batch.max_seqlen, batch.columns, batch.sequences, batch.key_mask)
    return _explicit(qkv, *where, heads, scale, p, seed, scores_bias)


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
    lse = (heads, qkv.shape[0]) if implementation == "triton" else 0
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), qkv.new_empty(lse, dtype=torch.float32)


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
    if seed is not None:
        return _explicit(qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed)[0]
    if qkv.device.type == "cpu":
        return _sdpa_by_sequence(qkv, cu_seqlens, key_mask, heads, scale)
    return _sdpa_on_grid(qkv, cu_seqlens, max_seqlen, sequences, key_mask, heads, scale)


def _backward_torch(grad, qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed):
    place, kept = _grid(cu_seqlens, max_seqlen, sequences, key_mask)
    query, key, value = _spread(qkv, place, kept.shape, (3, heads))
    (of_out,) = _spread(grad, place, kept.shape, (1, heads))
    keep = None if seed is None else _keep_mask(seed, p, place, columns, kept.shape, heads)
    grads = reference.attend_backward(of_out, query, key, value, scale, kept[:, None, None, :], keep, p)
    return torch.cat([_gather(each, place) for each in grads], dim=1)


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


def _sdpa_on_grid(qkv, cu_seqlens, max_seqlen, sequences, key_mask, heads, scale):
    """One call for all sequences, padded to the longest: few launches, where a launch is what costs."""
    place, kept = _grid(cu_seqlens, max_seqlen, sequences, key_mask)
    query, key, value = _spread(qkv, place, kept.shape, (3, heads))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=kept[:, None, None, :], scale=scale)
    return _gather(out, place)


def _explicit(
    qkv, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p=0.0, seed=None, scores_bias=None
):
    """The formula with all probabilities at hand: what dropout and a caller's own bias need."""
    place, kept = _grid(cu_seqlens, max_seqlen, sequences, key_mask)
    query, key, value = _spread(qkv, place, kept.shape, (3, heads))
    keep = None if seed is None else _keep_mask(seed, p, place, columns, kept.shape, heads)
    out, probabilities = reference.attend(query, key, value, scale, kept[:, None, None, :], keep, p, scores_bias)
    return _gather(out, place), probabilities


def _grid(cu_seqlens, max_seqlen, sequences, key_mask):
    """Each token's place in a flattened `(sequences, max_seqlen)`, and which of those places are keys."""
    token = torch.arange(sequences.shape[0], device=sequences.device)
    place = sequences * max_seqlen + token - cu_seqlens.long()[sequences]
    kept = sequences.new_zeros(cu_seqlens.shape[0] - 1, max_seqlen, dtype=torch.bool)
    real = torch.ones_like(sequences, dtype=torch.bool) if key_mask is None else key_mask
    return place, kept.flatten().index_copy(0, place, real).view_as(kept)


def _spread(x, place, grid, parts):
    """`(tokens, parts · heads · head_dim)` to `(parts, sequences, heads, max_seqlen, head_dim)`, zeros at no token."""
    # Not grid.numel(), which torch.jit.trace takes as a constant.
    padded = x.new_zeros(math.prod(grid), x.shape[1]).index_copy(0, place, x)
    return padded.view(*grid, *parts, x.shape[1] // (parts[0] * parts[1])).permute(2, 0, 3, 1, 4)


def _gather(out, place):
    """`(sequences, heads, max_seqlen, head_dim)` to `(tokens, hidden)`."""
    return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, place)


def _keep_mask(seed, p, place, columns, grid, heads):
    """The dropout mask of `(sequences, heads, max_seqlen, max_seqlen)` probabilities."""
    column = columns.new_zeros(math.prod(grid)).index_copy(0, place, columns).view(grid)
    sequence = torch.arange(grid[0], device=seed.device)[:, None, None]
    head = torch.arange(heads, device=seed.device)[None, :, None]
    width = int(columns.max()) + 1 if len(columns) else 0
    keep = keep_mask(seed, p, width, column[:, None, :], sequence, head)
    return keep.gather(-1, column[:, None, None, :].expand(*keep.shape[:-1], grid[1]))


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
    "native": ATTENTION,
    "torch": _stateless(_forward_torch, _backward_torch),
    "reference": _stateless(_forward_reference, _backward_reference),
}
