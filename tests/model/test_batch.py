"""TokenBatch: which tokens it takes from a grid, and that they find back to their places."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from erniem_fast.batch import PaddingMask, TokenBatch, key_bias_of, read

ROWS = {
    "full": ["11111", "11111"],
    "right": ["11111", "11100", "10000"],
    "left": ["00111", "11111", "00001"],
    "holes": ["10101", "01110", "11011", "00100"],
    "empty rows": ["00000", "11000", "00000", "00011", "00000"],
    "nothing": ["00000", "00000"],
    "first only": ["10000", "10000"],
    "one column": ["1", "0", "1"],
    "one token": ["1"],
    "no rows": [],
    "no columns": ["", ""],
}
MASKS = {
    name: torch.tensor([[int(value) for value in row] for row in rows], dtype=torch.bool).view(
        len(rows), len(rows[0]) if rows else 5
    )
    for name, rows in ROWS.items()
}
CASES = [(name, keep_first) for name in MASKS for keep_first in (False, True)]
every_case = pytest.mark.parametrize(("name", "keep_first"), CASES)


def batch_of(name, keep_first):
    return TokenBatch.from_mask(MASKS[name], keep_first=keep_first)


def computed(name, keep_first):
    """The `(row, column)` of every token that is to be computed, in order."""
    rows, columns = MASKS[name].shape
    cells = itertools.product(range(rows), range(columns))
    return [(r, c) for r, c in cells if MASKS[name][r, c] or (keep_first and c == 0)]


def naive_unpack(name, keep_first, tokens):
    grid = torch.zeros(*MASKS[name].shape, *tokens.shape[1:], dtype=tokens.dtype)
    for token, (row, column) in enumerate(computed(name, keep_first)):
        if MASKS[name][row, column]:
            grid[row, column] = tokens[token]
    return grid


def assert_order(batch, lengths):
    """Sequences from the longest to the shortest, and no claim that columns count tokens where they do not."""
    order = batch.sequences.longest_first.tolist()
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[sequence] for sequence in order] == sorted(lengths, reverse=True)
    counted = [column for length in lengths for column in range(length)]
    assert batch.sequences.contiguous == (batch.columns.tolist() == counted)


@every_case
def test_from_mask(name, keep_first):
    mask = MASKS[name].clone()
    batch = TokenBatch.from_mask(mask, keep_first=keep_first)
    rows, columns = mask.shape
    tokens = computed(name, keep_first)
    lengths = [sum(row == each for row, _ in tokens) for each in range(rows)]
    assert torch.equal(mask, MASKS[name]), "the caller's mask was written to"
    assert batch.tokens == len(tokens)
    assert batch.sequences.sequence_ids.tolist() == [row for row, _ in tokens]
    assert batch.columns.tolist() == [column for _, column in tokens]
    assert batch.sequences.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert max(lengths, default=0) <= batch.sequences.max_seqlen <= columns
    assert batch.grid == (rows, columns)
    assert_order(batch, lengths)
    assert batch.sequences.cu_seqlens.dtype == torch.int32
    assert batch.columns.dtype == batch.sequences.sequence_ids.dtype == torch.int64
    attended = [bool(mask[cell]) for cell in tokens]
    real, key_bias = batch.real, batch.sequences.key_bias
    assert (None if real is None else real.tolist()) == (None if all(attended) else attended)
    assert (None if key_bias is None else key_bias.tolist()) == (None if all(attended) else key_bias_of(real).tolist())
    places = range(len(tokens)) if batch.indices is None else batch.indices.tolist()
    assert list(places) == [row * columns + column for row, column in tokens]


@pytest.mark.parametrize("view", ["transposed", "expanded", "strided"])
def test_from_mask_takes_views(view):
    mask = {
        "transposed": MASKS["holes"].T.contiguous().T,
        "expanded": MASKS["left"][:1].expand(3, 5),
        "strided": MASKS["holes"].repeat_interleave(2, dim=1)[:, ::2],
    }[view]
    ours = TokenBatch.from_mask(mask, keep_first=True)
    contiguous = TokenBatch.from_mask(mask.contiguous(), keep_first=True)
    for field in ("columns", "indices", "cu_seqlens", "sequence_ids", "key_bias"):
        here, there = (each if hasattr(each, field) else each.sequences for each in (ours, contiguous))
        assert torch.equal(getattr(here, field), getattr(there, field)), field


@every_case
def test_sizes_are_read_with_other_values(name, keep_first):
    padding = PaddingMask(MASKS[name], keep_first)
    others = {"a": torch.tensor(True), "b": torch.tensor([-7]), "c": torch.tensor([[2**40]])}
    found = read({**others, **padding.sizes()})
    assert {each: found.pop(each) for each in others} == {"a": 1, "b": -7, "c": 2**40}
    assert found["tokens"] == len(computed(name, keep_first))
    assert found["real_tokens"] == int(MASKS[name].sum())
    assert padding.pack(**found).tokens == found["tokens"]


@every_case
@pytest.mark.parametrize("features", [(), (3,), (2, 3)])
def test_pack_and_unpack(name, keep_first, features):
    batch, mask = batch_of(name, keep_first), MASKS[name]
    x = torch.randn(*mask.shape, *features)
    packed = batch.pack(x)
    assert packed.shape == (batch.tokens, *features)
    for token, cell in enumerate(computed(name, keep_first)):
        assert torch.equal(packed[token], x[cell])
    real = mask.view(*mask.shape, *[1] * len(features))
    assert torch.equal(batch.unpack(packed), torch.where(real, x, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["full", "holes", "empty rows"])
def test_unpack_keeps_the_dtype(name, dtype):
    batch = batch_of(name, keep_first=True)
    tokens = torch.arange(1, batch.tokens + 1).to(dtype)
    unpacked = batch.unpack(tokens)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, naive_unpack(name, True, tokens))


@every_case
def test_unpack_gives_zeros_at_padding_whatever_was_computed_there(name, keep_first):
    batch = batch_of(name, keep_first)
    tokens = torch.randn(batch.tokens, 3)
    if batch.real is not None:
        tokens[~batch.real] = torch.nan
    assert torch.equal(batch.unpack(tokens), naive_unpack(name, keep_first, tokens))


@every_case
def test_gradients_of_pack_and_unpack(name, keep_first):
    batch, mask = batch_of(name, keep_first), MASKS[name]
    x = torch.randn(*mask.shape, 2, requires_grad=True)
    tokens = torch.randn(batch.tokens, 2, requires_grad=True)
    grad_packed, grad_grid = torch.randn(batch.tokens, 2), torch.randn(*mask.shape, 2)
    (grad_x,) = torch.autograd.grad(batch.pack(x), x, grad_packed)
    (grad_tokens,) = torch.autograd.grad(batch.unpack(tokens), tokens, grad_grid)
    expected_grad_x, expected_grad_tokens = torch.zeros_like(x), torch.zeros_like(tokens)
    for token, cell in enumerate(computed(name, keep_first)):
        expected_grad_x[cell] = grad_packed[token]
        expected_grad_tokens[token] = grad_grid[cell] * mask[cell]
    assert torch.equal(grad_x, expected_grad_x)
    assert torch.equal(grad_tokens, expected_grad_tokens)


@every_case
def test_first_tokens(name, keep_first):
    batch = batch_of(name, keep_first)
    tokens = torch.randn(batch.tokens, 4, dtype=torch.float64, requires_grad=True)
    rows = [row for row, _ in computed(name, keep_first)]
    expected = torch.zeros(len(MASKS[name]), 4, dtype=torch.float64)
    for row in set(rows):
        expected[row] = tokens.detach()[rows.index(row)]
    assert torch.equal(batch.first_tokens(tokens), expected)
    if batch.tokens:
        assert gradcheck(batch.first_tokens, tokens)


@pytest.mark.parametrize("name", [name for name in MASKS if MASKS[name].shape[1] > 0])
def test_first_tokens_are_the_first_column_where_it_is_kept(name):
    x = torch.randn(*MASKS[name].shape, 4)
    batch = batch_of(name, keep_first=True)
    assert torch.equal(batch.first_tokens(batch.pack(x)), x[:, 0])


def naive_attention(name, keep_first, probabilities):
    tokens, (rows, columns) = computed(name, keep_first), MASKS[name].shape
    grid = torch.zeros(rows, probabilities.shape[1], columns, columns, dtype=probabilities.dtype)
    for row in range(rows):
        cells = [column for each, column in tokens if each == row]
        for (i, query), (j, key) in itertools.product(enumerate(cells), repeat=2):
            if MASKS[name][row, query] and MASKS[name][row, key]:
                grid[row, :, query, key] = probabilities[row, :, i, j]
    return grid


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_attention(name, keep_first, dtype):
    batch = batch_of(name, keep_first)
    probabilities = torch.rand(len(MASKS[name]), 2, batch.sequences.max_seqlen, batch.sequences.max_seqlen).to(dtype)
    unpacked = batch.unpack_attention(probabilities)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, naive_attention(name, keep_first, probabilities))


def test_gradients_of_unpack_attention():
    batch = batch_of("holes", keep_first=True)
    keys = batch.sequences.max_seqlen
    probabilities = torch.rand(4, 1, keys, keys, dtype=torch.float64, requires_grad=True)
    assert gradcheck(batch.unpack_attention, probabilities)


@pytest.mark.parametrize(
    "lengths",
    [[4], [3, 1, 5], [0, 3], [3, 0], [2, 0, 0, 4], [0, 0, 2, 0, 1, 0], [0, 0], [], [512, 1, 0, 130]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_cu_seqlens(lengths, dtype):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
    tokens = sum(lengths)
    batch = TokenBatch.from_cu_seqlens(cu_seqlens, 600, tokens)
    assert batch.tokens == tokens
    assert batch.sequences.cu_seqlens.dtype == torch.int32
    assert batch.sequences.cu_seqlens.tolist() == cu_seqlens.tolist()
    assert batch.sequences.sequence_ids.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert batch.columns.tolist() == [column for length in lengths for column in range(length)]
    assert (batch.sequences.max_seqlen, batch.sequences.key_bias) == (600, None)
    assert (batch.grid, batch.real) == ((1, tokens), None)
    assert_order(batch, lengths)
    x = torch.randn(1, tokens, 3)
    assert torch.equal(batch.pack(x), x[0])
    assert torch.equal(batch.unpack(x[0]), x)
    firsts = [x[0, start] if length else torch.zeros(3) for start, length in zip(cu_seqlens, lengths, strict=False)]
    assert torch.equal(batch.first_tokens(x[0]), torch.stack(firsts) if firsts else torch.empty(0, 3))


def test_unpack_attention_of_input_that_came_packed():
    lengths, bound = [3, 0, 5, 1], 7
    batch = TokenBatch.from_cu_seqlens(torch.tensor([0, 3, 3, 8, 9]), bound, 9)
    probabilities = torch.rand(4, 2, bound, bound)
    expected = torch.zeros_like(probabilities)
    for sequence, length in enumerate(lengths):
        expected[sequence, :, :length, :length] = probabilities[sequence, :, :length, :length]
    assert torch.equal(batch.unpack_attention(probabilities), expected)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "no columns"])
def test_padded(name):
    mask = MASKS[name]
    rows, columns = mask.shape
    batch = TokenBatch.padded((rows, columns), mask.device, key_bias_of(mask))
    assert batch.sequences.cu_seqlens.tolist() == [row * columns for row in range(rows + 1)]
    assert batch.sequences.cu_seqlens.dtype == torch.int32
    assert batch.sequences.sequence_ids.tolist() == [row for row in range(rows) for _ in range(columns)]
    assert batch.columns.tolist() == list(range(columns)) * rows
    assert batch.sequences.key_bias.tolist() == [0.0 if each else -torch.inf for each in mask.flatten().tolist()]
    assert (batch.sequences.max_seqlen, batch.grid, batch.real) == (columns, (rows, columns), None)
    assert_order(batch, [columns] * rows)
    assert TokenBatch.padded((rows, columns), mask.device).sequences.key_bias is None
    x = torch.randn(rows, columns, 3)
    assert torch.equal(batch.unpack(batch.pack(x)), x)
    assert torch.equal(batch.first_tokens(batch.pack(x)), x[:, 0])
    probabilities = torch.rand(rows, 2, columns, columns)
    assert torch.equal(batch.unpack_attention(probabilities), probabilities)


def test_a_full_mask_is_the_padded_grid_without_indices():
    batch = batch_of("full", keep_first=False)
    assert (batch.indices, batch.sequences.key_bias, batch.real) == (None, None, None)


def test_full_batches_are_made_once_and_serve_all_modes():
    with torch.inference_mode():
        batch = TokenBatch.padded((2, 3), torch.device("cpu"))
    assert TokenBatch.padded((2, 3), torch.device("cpu")) is batch
    assert not batch.columns.is_inference()
    assert batch.columns.tolist() == [0, 1, 2, 0, 1, 2]
    assert TokenBatch.padded((3, 2), torch.device("cpu")).sequences.cu_seqlens.tolist() == [0, 2, 4, 6]
    mask = torch.tensor([[True, False, True], [True, True, True]])
    others = [
        TokenBatch.padded((2, 3), torch.device("meta")),
        TokenBatch.padded((2, 3), torch.device("cpu"), key_bias_of(mask)),
        TokenBatch.padded((2, 3), torch.device("cpu"), real=mask),
    ]
    with FakeTensorMode():
        others.append(TokenBatch.padded((2, 3), torch.device("cpu")))
    assert not any(each is batch for each in others)


def test_values_are_read_as_integers():
    values = {"a": torch.tensor(3, dtype=torch.int32), "b": torch.tensor([True]), "c": torch.tensor([[-2]])}
    assert read(values) == {"a": 3, "b": 1, "c": -2}
    assert read({}) == {}
