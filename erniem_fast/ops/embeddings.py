"""`embeddings`: dropout(LN(word_table[ids] + position_table[positions])), the start of a forward."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import Dropout, drop_features
from ..native import embeddings as native_embeddings
from ..reference import Norm, NormScale, wide, word_rows
from .choose import Implementation, choose
from .layer_norm import REFERENCE, TORCH, TRITON, LayerNorm, with_bias
from .native import native_implementation
from .op import Op
from .triton import served_by_triton


def embeddings(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm: Norm,
    padding_idx: int,
    dropout: Dropout | None = None,
    sparse: bool = False,
    word_scale: Tensor | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """dropout(LN(word_table[ids] + position_table[positions])).

    Args:
        ids, positions: int64 `(tokens,)`, rows of the two tables; the caller has checked their range.
        word_table, position_table: `(vocabulary, hidden)` and `(max_positions, hidden)`, floating point, of one dtype.
            Beside a position table in float32, on the CPU, the word table may be bfloat16 or int8.
        norm: the parameters of LN, layer normalisation (Ba et al., arXiv 1607.06450).
        padding_idx: the row of both tables that gets no gradient.
        dropout: the dropout of the result; None for no dropout.
        sparse: makes the word table's gradient a sparse COO tensor, as `nn.Embedding(sparse=True)` does; a dense one
            has the size of the table. Eager only: torch.compile has no sparse gradients.
        word_scale: float32 `(vocabulary,)`, factors of the rows of a word table in int8; otherwise None.
        position_padding_idx: the row of the position table that gets no gradient, if it is another one; -1 for none.

    Returns:
        `(tokens, hidden)` in the position table's dtype.

    Raises:
        IndexError: on the CPU, an id or a position is not a row of its table.
        ValueError: a flag has a value that it does not take.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype; or, with
            `ERNIEM_FAST_VERIFY=1`, the result differs from the reference's.
    """
    implementation = choose("embeddings", position_table.device, position_table.dtype)
    tables, position_padding = (word_table, position_table), position_padding_idx
    if position_padding is None:
        position_padding = padding_idx
    rest = with_bias(norm), padding_idx, dropout, sparse, word_scale, position_padding
    return _OP(implementation, ids, positions, *tables, *rest)


class _Results(NamedTuple):
    out: Tensor
    z: Tensor  # the layer norm's input


class _Gradients(NamedTuple):
    word_table: Tensor  # with `sparse`, and for a frozen table, one row per token instead; zeros for padding_idx
    position_table: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def _forward(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm: Norm,
    padding_idx: int,
    dropout: Dropout | None,
    sparse: bool,
    word_scale: Tensor | None,
    position_padding_idx: int,
) -> _Results:
    out = position_table.new_empty(ids.shape[0], position_table.shape[1])
    return _Results(out, out.new_empty(out.shape))


def _backward(
    grad: Tensor,
    z: Tensor,
    ids: Tensor,
    positions: Tensor,
    word_table: torch.Size | None,
    position_table: torch.Size,
    norm: NormScale,
    padding_idx: int,
    dropout: Dropout | None,
    sparse: bool,
    position_padding_idx: int,
) -> _Gradients:
    # A frozen word table needs no gradient, which would be as large as the table; the tokens' rows exist anyway.
    words = z.shape[0] if sparse or word_table is None else word_table[0]
    tables = (z.new_empty(rows, z.shape[1]) for rows in (words, position_table[0]))
    vectors = (norm.weight.new_empty(norm.weight.shape, dtype=wide(z.dtype)) for _ in range(2))
    return _Gradients(*tables, *vectors)


def _finish(grads: _Gradients, ids: Tensor, word_table: torch.Size | None, sparse: bool) -> _Gradients:
    if not sparse or word_table is None:
        return grads
    words = torch.sparse_coo_tensor(ids[None], grads.word_table, word_table, check_invariants=False)
    return grads._replace(word_table=words)


def _composed(layer_norm: LayerNorm) -> Implementation:
    def forward(
        ids, positions, word_table, position_table, norm, padding_idx, dropout, word_scale, position_padding_idx
    ):
        words = word_rows(ids, word_table, padding_idx, word_scale)
        padding = position_padding_idx if position_padding_idx >= 0 else None
        z = words + F.embedding(positions, position_table, padding)
        return drop_features(layer_norm.forward(z, norm), dropout), z

    def backward(
        grad, z, ids, positions, word_table, position_table, norm, padding_idx, dropout, sparse, position_padding_idx
    ):
        grad_z, *grads_of_norm = layer_norm.backward(drop_features(grad, dropout), z, norm)
        if word_table is None:
            grad_words = grad_z
        elif sparse:
            grad_words = grad_z.masked_fill((ids == padding_idx)[:, None], 0)
        else:
            grad_words = _scatter(grad_z, ids, word_table[0], padding_idx)
        return grad_words, _scatter(grad_z, positions, position_table[0], position_padding_idx), *grads_of_norm

    return Implementation(forward, backward)


def _scatter(rows: Tensor, index: Tensor, size: int, padding_idx: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(rows, index, size, padding_idx, False)


_OP = Op(
    "embeddings",
    _forward,
    _backward,
    {
        "native": native_implementation(native_embeddings, devices=("cpu", "cuda")),
        "triton": served_by_triton(_composed(TRITON)),
        "torch": _composed(TORCH),
        "reference": _composed(REFERENCE),
    },
    _finish,
)
