"""`attention`: softmax(Q Kᵀ · scale) with dropout, times V, within each sequence of a batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import modes, reference
from ..batch import Sequences, TokenBatch
from ..dropout import Dropout
from ..native import attention as native_attention
from . import attention_torch
from .attention_torch import QKV
from .choose import Implementation, choose
from .native import native_implementation
from .op import Op
from .triton import triton_implementation


def attention(qkv: QKV, batch: TokenBatch, heads: int, scale: float, dropout: Dropout | None = None) -> Tensor:
    """softmax(Q Kᵀ · scale) with dropout, times V, within each sequence and over the keys of the batch's key mask.

    A sequence without keys gives zeros, forward and backward.

    Args:
        qkv: `(tokens, 3 · heads · head_dim)`, all queries, then all keys, then all values of a token; where
            `modes.is_exported`, also the three apart.
        batch: the tokens.
        heads: number of heads.
        scale: of the scores, positive; 1 / √head_dim in ERNIE-M (Vaswani et al., arXiv 1706.03762, section 3.2.1).
        dropout: of the probabilities; None for none.

    Returns:
        `(tokens, heads · head_dim)` in the dtype of `qkv`.

    Raises:
        ValueError: the features of `qkv` are no three times `heads` of a size, or `scale` is not positive.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype.
    """
    if modes.is_exported():
        return attention_torch.forward_exported(qkv, batch, heads, scale, dropout)
    if qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} features, which {heads} heads cannot divide into queries, keys and values of one "
            f"size; heads must be the number that the weights of q_proj, k_proj and v_proj hold."
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}; for a negative one, negate the queries.")
    implementation = choose("attention", qkv.device, qkv.dtype, qkv.shape[1] // (3 * heads))
    return _OP(implementation, qkv, batch.sequences, heads, scale, dropout)


def attention_with_probabilities(
    qkv: QKV,
    batch: TokenBatch,
    heads: int,
    scale: float,
    scores_bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` in plain PyTorch, for callers that want the probabilities or add their own bias to the scores.

    Args:
        qkv, batch, heads, scale, dropout: as in `attention`.
        scores_bias: added to the scaled scores, broadcastable to `(sequences, heads, queries, keys)`; -inf where a key
            is not to be attended to. Only in the padded layout, where queries and keys are columns of the grid.

    Returns:
        `(tokens, heads · head_dim)`, and the probabilities after dropout, `(sequences, heads, max_seqlen, max_seqlen)`
        by the tokens' index in their sequence; without meaning where there is no token.
    """
    return attention_torch.forward_with_probabilities(qkv, batch, heads, scale, scores_bias, dropout)


class _Results(NamedTuple):
    out: Tensor
    statistics: Tensor  # of the scores, see erniem_fast/kernels/attention.py


class _Gradients(NamedTuple):
    qkv: Tensor


def _forward(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None) -> _Results:
    statistics = qkv.new_empty(heads, qkv.shape[0], 2, dtype=torch.float32)
    return _Results(qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), statistics)


def _backward(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    qkv: Tensor,
    sequences: Sequences,
    heads: int,
    scale: float,
    dropout: Dropout | None,
) -> _Gradients:
    return _Gradients(qkv.new_empty(qkv.shape))


_OP = Op(
    "attention",
    _forward,
    _backward,
    {
        # Below 8.0 Triton has no tensor-core products, and the tiles do not fit (seen with Triton 3.6 and 3.9).
        "triton": triton_implementation("attention", largest=256, capability=(8, 0)),
        "native": native_implementation(native_attention, devices=("cpu",), saves=False),
        "torch": Implementation(attention_torch.forward, attention_torch.backward, saves=False),
        "reference": Implementation(reference.attention, reference.attention_backward, saves=False),
    },
)
