"""Embeddings, by every implementation that a CPU runs."""

import pytest
import torch

from erniem_fast import ops, use_kernels
from erniem_fast.reference import Norm, quantise_weight
from tests.batches import dropout_of
from tests.ops.problems import (
    BATCHES,
    EPS,
    PADDING,
    assert_rule_one,
    each_implementation,
    embeddings_problem,
    largest,
    norm_leaves,
    randn,
    serving,
)


@each_implementation("embeddings")
@pytest.mark.parametrize(
    ("batch", "hidden", "p"),
    [
        ("short", 96, 0.0),
        ("short", 384, 0.1),
        ("around 64", 768, 0.1),
        ("unequal", 1024, 0.0),
        ("holes, packed", 97, 0.3),
        ("holes, padded", 768, 0.3),
        ("no tokens", 96, 0.1),
    ],
)
def test_embeddings(implementation, dtype, batch, hidden, p):
    with use_kernels(embeddings=implementation):
        assert_rule_one(embeddings_problem(BATCHES[batch], dtype, hidden, p))


@pytest.mark.parametrize("implementation", serving("embeddings", interpreted=True))
@pytest.mark.parametrize("position_padding", [None, 5, -1])
def test_padding_rows_of_the_tables_get_no_gradient(implementation, position_padding):
    ids, positions = torch.tensor([PADDING, 3, 3, PADDING, 4, 3, 5, 5]), torch.tensor([2, PADDING, 4, 5, 6, 2, 3, 4])
    word_table, position_table = (torch.randn(9, 96, requires_grad=True) for _ in range(2))
    norm = Norm(torch.rand(96), torch.randn(96), EPS)
    with use_kernels(embeddings=implementation):
        options = {"position_padding_idx": position_padding}
        out = ops.embeddings(ids, positions, word_table, position_table, norm, PADDING, **options)
    out.backward(torch.randn_like(out))
    paddings = PADDING, PADDING if position_padding is None else position_padding
    touched = [{*rows.tolist()} - {padding} for rows, padding in zip((ids, positions), paddings, strict=True)]
    for table, rows in zip((word_table, position_table), touched, strict=True):
        assert set(table.grad.abs().sum(dim=1).nonzero().squeeze(1).tolist()) == rows


@each_implementation("embeddings")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sparse_gradient_of_the_word_table(implementation, dtype, p):
    """Its rows, added up, are the dense gradient; rows of padding are zero."""
    batch, words = BATCHES["short"], 7
    ids, positions = torch.randint(0, words, (51,)), batch.columns + 2
    tables = [randn(rows, 96, dtype=dtype).requires_grad_() for rows in (words, 19)]
    norm, grad = Norm(*norm_leaves(96, dtype).values(), EPS), randn(51, 96, dtype=dtype)
    with use_kernels(embeddings=implementation):
        sparse, dense = (
            torch.autograd.grad(
                ops.embeddings(ids, positions, *tables, norm, PADDING, dropout_of(batch, p), sparse),
                tables,
                grad,
            )
            for sparse in (True, False)
        )
    assert sparse[0].is_sparse
    assert sparse[0].dtype == dtype
    # The dense gradient is a sum of about 51 / 7 rows in the table's dtype.
    summed = sparse[0].double().to_dense()
    assert largest(summed - dense[0]) <= 8 * torch.finfo(dtype).eps * largest(summed)
    assert largest(summed[PADDING]) == 0.0
    assert torch.equal(sparse[1], dense[1])


NARROW = {"bfloat16": lambda table: (table.bfloat16(), None), "int8": quantise_weight}


@pytest.mark.parametrize("implementation", serving("embeddings", interpreted=True))
@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize(("hidden", "p"), [(97, 0.3), (768, 0.0)])
def test_narrow_word_tables(implementation, narrow, hidden, p, monkeypatch):
    """Their rows are those of a wide table with the same numbers; the other parameters have gradients."""
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
    batch = BATCHES["short"]
    ids, positions = torch.randint(9, (batch.tokens,)), batch.columns + 2
    words, scale = narrow(torch.randn(9, hidden))
    wide = words.float() if scale is None else words * scale[:, None]
    leaves = [torch.randn(each, requires_grad=True) for each in ((19, hidden), (hidden,), (hidden,))]
    grad = torch.randn(batch.tokens, hidden)

    def run(table, **options):
        positions_table, weight, bias = leaves
        norm, dropout = Norm(weight, bias, EPS), dropout_of(batch, p)
        out = ops.embeddings(ids, positions, table, positions_table, norm, PADDING, dropout, **options)
        return out, *torch.autograd.grad(out, leaves, grad)

    with use_kernels(embeddings=implementation):
        for result, expected in zip(run(words, word_scale=scale), run(wide), strict=True):
            assert result.dtype == torch.float32
            # Kernels may round the product with the scale and the sum with the position once, or one after another.
            units = 16 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(result, expected, rtol=0, atol=units * largest(expected))


@pytest.mark.skipif("native" not in serving("embeddings"), reason="the native library cannot be built here")
def test_int8_words_need_float32_positions():
    words, scale = quantise_weight(torch.randn(9, 96))
    norm, ids = Norm(torch.ones(96), torch.zeros(96), EPS), torch.zeros(3, dtype=torch.long)
    with use_kernels(embeddings="native"), pytest.raises(ValueError, match=r"int8 needs a position table in float32"):
        ops.embeddings(ids, ids, words, torch.randn(9, 96).half(), norm, PADDING, word_scale=scale)
