"""`embeddings`: dropout(LN(word_table[ids] + position_table[positions])), the start of a forward."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..batch import TokenBatch
from ..native import embeddings as native
from ..native.library import DEVICES
from ..reference import wide
from .implementation import IMPLEMENTATIONS, Implementation, call, choose, differentiable, once_differentiable, run
from .layer_norm import REFERENCE, TORCH, TRITON, LayerNorm, bias_of
from .native import implementation as native_implementation
from .triton import served


def embeddings(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    padding_idx: int,
    batch: TokenBatch,
    p: float = 0.0,
    seed: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """dropout(LN(word_table[ids] + position_table[positions])).

    Args:
        ids, positions: int64 `(tokens,)`, rows of the two tables; the caller has checked their range.
        word_table, position_table: `(vocabulary, hidden)` and `(max_positions, hidden)`, of one dtype.
        weight, norm_bias: `(hidden,)`, of the layer norm, whose bias may be None.
        eps: added to the variance.
        padding_idx: the row that gets no gradient, in both tables.
        batch: the tokens' coordinates, for dropout.
        p: probability of dropping an element.
        seed: int64, one element; None for no dropout.
        sparse: gives the word table's gradient as a sparse COO tensor, as `nn.Embedding(sparse=True)` does; a dense
            one has the size of the table. Eager only: torch.compile has no sparse gradients.

    Returns:
        `(tokens, hidden)` in the tables' dtype.

    Raises:
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype.
    """
    name = choose("embeddings", word_table.device, word_table.dtype)
    tables = (word_table, position_table, weight, bias_of(weight, norm_bias))
    save = differentiable(*tables)
    inputs = (ids, positions, *tables, eps, padding_idx, batch.columns, batch.sequences, p, seed, save)
    return call("embeddings", name, partial(_forward, sparse=sparse), save, *inputs)[0]


@torch.library.custom_op("erniem_fast::embeddings", mutates_args=())
def _forward(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    padding_idx: int,
    columns: Tensor,
    sequences: Tensor,
    p: float,
    seed: Tensor | None,
    save: bool,
    implementation: str,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the layer norm's input `z` for the backward, empty where it is not to be saved."""
    tables = (word_table, position_table, weight, norm_bias)
    inputs = (ids, positions, *tables, eps, padding_idx, columns, sequences, p, seed, save)
    return run("embeddings", implementation, "forward", *inputs)


@torch.library.custom_op("erniem_fast::embeddings_backward", mutates_args=())
def _backward(
    grad: Tensor,
    z: Tensor,
    ids: Tensor,
    positions: Tensor,
    words: int,
    max_positions: int,
    weight: Tensor,
    eps: float,
    padding_idx: int,
    columns: Tensor,
    sequences: Tensor,
    p: float,
    seed: Tensor | None,
    sparse: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of word_table, position_table, weight and norm_bias; `sparse` leaves the first as rows, one a token."""
    rows = (ids, positions, words, max_positions)
    inputs = (grad, z, *rows, weight, eps, padding_idx, columns, sequences, p, seed, sparse)
    return run("embeddings", implementation, "backward", *inputs)


@_forward.register_fake
def _(ids, positions, word_table, position_table, weight, norm_bias, eps, padding_idx, *rest):
    *_, save, _, _ = rest
    out = word_table.new_empty(ids.shape[0], word_table.shape[1])
    return out, out.new_empty(out.shape) if save else out.new_empty(0)


@_backward.register_fake
def _(grad, z, ids, positions, words, max_positions, weight, *rest):
    *_, sparse, _ = rest
    tables = (z.new_empty(rows, z.shape[1]) for rows in (z.shape[0] if sparse else words, max_positions))
    return *tables, *(weight.new_empty(weight.shape, dtype=wide(z.dtype)) for _ in range(2))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # what is only saved has no gradient: no zeros need be written for it
    ids, positions, word_table, position_table, weight, _, eps, padding_idx, columns, sequences, p, seed, *_ = inputs
    ctx.save_for_backward(output[1], ids, positions, weight, columns, sequences, seed)
    ctx.rows = (word_table.shape[0], position_table.shape[0])
    ctx.eps, ctx.padding_idx, ctx.p = eps, padding_idx, p
    ctx.implementation, ctx.sparse = inputs[-2:]


def _autograd(ctx, grad, _):
    z, ids, positions, weight, columns, sequences, seed = ctx.saved_tensors
    norm = (weight, ctx.eps, ctx.padding_idx)
    # A frozen word table wants no gradient, which would be as large as the table; its rows are at hand anyway.
    frozen = not ctx.needs_input_grad[2]
    choice = (ctx.sparse or frozen, ctx.implementation)
    of_words, *grads = _backward(grad, z, ids, positions, *ctx.rows, *norm, columns, sequences, ctx.p, seed, *choice)
    if frozen:
        of_words = None
    elif ctx.sparse:
        rows = of_words.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        of_words = torch.sparse_coo_tensor(ids[None], rows, (ctx.rows[0], z.shape[1]), check_invariants=False)
    return None, None, of_words, *grads, *[None] * 9


_forward.register_autograd(_autograd, setup_context=_setup_context)
once_differentiable(_backward)


def _composite(norm: LayerNorm) -> Implementation:
    def forward(
        ids,
        positions,
        word_table,
        position_table,
        weight,
        norm_bias,
        eps,
        padding_idx,
        columns,
        sequences,
        p,
        seed,
        save,
    ):
        z = F.embedding(ids, word_table, padding_idx) + F.embedding(positions, position_table, padding_idx)
        out = reference.feature_dropout(norm.forward(z, weight, norm_bias, eps), columns, sequences, p, seed)
        return out, z if save else z.new_empty(0)

    def backward(
        grad, z, ids, positions, words, max_positions, weight, eps, padding_idx, columns, sequences, p, seed, sparse
    ):
        grad = reference.feature_dropout(grad, columns, sequences, p, seed)
        of_z, of_weight, of_norm_bias = norm.backward(grad, z, weight, eps)
        of_words = of_z if sparse else _scatter(of_z, ids, words, padding_idx)
        return of_words, _scatter(of_z, positions, max_positions, padding_idx), of_weight, of_norm_bias

    return Implementation(forward, backward)


def _scatter(rows: Tensor, index: Tensor, size: int, padding_idx: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(rows, index, size, padding_idx, False)


IMPLEMENTATIONS["embeddings"] = {
    "native": native_implementation(native.forward, native.backward, DEVICES),
    "triton": served(_composite(TRITON)),
    "torch": _composite(TORCH),
    "reference": _composite(REFERENCE),
}
