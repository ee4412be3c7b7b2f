"""Embeddings, by every implementation that a CPU runs."""

import pytest
import torch

from erniem_fast import ops, use_kernels
from erniem_fast.reference import Norm
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
def test_padding_rows_of_the_tables_get_no_gradient(implementation):
    ids, positions = torch.tensor([PADDING, 3, 3, PADDING, 4, 3, 5, 5]), torch.tensor([2, PADDING, 4, 5, 6, 2, 3, 4])
    word_table, position_table = (torch.randn(9, 96, requires_grad=True) for _ in range(2))
    norm = Norm(torch.rand(96), torch.randn(96), EPS)
    with use_kernels(embeddings=implementation):
        out = ops.embeddings(ids, positions, word_table, position_table, norm, PADDING)
    out.backward(torch.randn_like(out))
    touched = [{*rows.tolist()} - {PADDING} for rows in (ids, positions)]
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
