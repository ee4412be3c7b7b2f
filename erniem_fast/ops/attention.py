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
    """softmax(Q Kᵀ · scale + key bias) with dropout, times V, within each sequence and the key ranges of its queries.

    A query without keys, because their bias is -inf or its range empty, gives zeros, forward and backward.

    Args:
        qkv: `(tokens, 3 · heads · head_dim)`, floating point: a token's queries, then its keys, then its values, of
            all heads. While a graph is exported (`modes.is_exported`), the three may also be separate tensors.
        batch: the tokens, their sequences, the key bias, which gets no gradient, and the key ranges.
        heads: number of heads.
        scale: factor of the scores, positive; 1 / √head_dim in ERNIE-M (Vaswani et al., arXiv 1706.03762, section
            3.2.1).
        dropout: the dropout of the probabilities; None for no dropout.

    Returns:
        `(tokens, heads · head_dim)` in the dtype of `qkv`.

    Raises:
        ValueError: `qkv` has a number of features that is not a multiple of 3 · `heads`; `scale` is not positive; or a
            flag has a value that it does not take.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device, dtype and head_dim; or,
            with `ERNIEM_FAST_VERIFY=1`, the result differs from the reference's.
    """
    if modes.is_exported():
        return attention_torch.forward_exported(qkv, batch, heads, scale, dropout)
    if qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} features, which {heads} heads cannot divide into queries, keys and values of "
            f"equal size; pass the number of heads that the weights of q_proj, k_proj and v_proj have."
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
        scores_bias: added to the scaled scores, broadcastable to `(sequences, heads, queries, keys)`; -inf for keys
            that are not attended to. Only in the padded layout, where queries and keys are columns of the grid.

    Returns:
        The result, `(tokens, heads · head_dim)`; and the probabilities after dropout, `(sequences, heads, max_seqlen,
        max_seqlen)`, whose last two indices are the query's and the key's index in the sequence. Both have the dtype
        of `qkv`. Probabilities at an index beyond a sequence's tokens have no meaning.
    """
    return attention_torch.forward_with_probabilities(qkv, batch, heads, scale, scores_bias, dropout)


class _Results(NamedTuple):
    out: Tensor
    statistics: Tensor  # of the scores; see `forward` in erniem_fast/kernels/attention.py


class _Gradients(NamedTuple):
    qkv: Tensor


def _forward(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None) -> _Results:
    statistics = qkv.new_empty(2, heads, qkv.shape[0], dtype=torch.float32)
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
        # Below compute capability 8.0, Triton 3.6 and 3.9 have no tensor-core products, and the tiles do not fit.
        "triton": triton_implementation("attention", largest=256, capability=(8, 0)),
        "native": native_implementation(native_attention, devices=("cpu",), saves=False),
        "torch": Implementation(attention_torch.forward, attention_torch.backward, saves=False),
        "reference": Implementation(reference.attention, reference.attention_backward, saves=False),
    },
)
