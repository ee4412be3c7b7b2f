"""Packed, padded and packed by the caller: the same tokens have the same results in every layout."""

import pytest
import torch

from erniem_fast import ErnieMForMultipleChoice
from tests.model.tiny import (
    COLUMNS,
    EMPTY,
    HIDDEN,
    IDS,
    LAYOUT_CASES,
    MASK,
    PAD,
    REAL,
    RIGHT,
    ROWS,
    assert_close,
    assert_same_gradients,
    flattened,
    gradients,
    load,
    logits_of,
    make_ids,
    random_weights,
    set_packing,
)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("head", LAYOUT_CASES)
def test_packed_equals_padded_at_real_tokens(head, dropout, monkeypatch):
    """Values and all gradients; with dropout too, whose mask depends on a token's place and not on the layout."""
    model_class, config = LAYOUT_CASES[head]
    shape = (2, 3, COLUMNS) if head == "choice" else (ROWS, COLUMNS)
    found = []
    for packed in (True, False):
        set_packing(monkeypatch, packed)
        model = load(model_class, dropout, **config).train()
        torch.manual_seed(3)
        values = logits_of(model(IDS.view(shape), attention_mask=MASK.view(shape)))
        # The row without tokens is computed in one layout and not in the other.
        values = {
            name: value[REAL] if value.shape[:2] == REAL.shape else value.view(ROWS, -1)[:EMPTY]
            for name, value in values.items()
        }
        sum((value * random_weights(value)).sum() for value in values.values()).backward()
        found.append((values, gradients(model)))
    (packed_values, packed_gradients), (padded_values, padded_gradients) = found
    for name, value in padded_values.items():
        assert_close(packed_values[name], value)
    assert_same_gradients(packed_gradients, padded_gradients)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_is_really_on(p):
    model = load(dropout=p).train()
    first, second = (model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2))
    assert torch.equal(first, second) == (p == 0.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("head", ["model", "sequence", "token"])
def test_input_that_comes_packed_equals_padded_input(head, dropout, packed):
    model_class, config = LAYOUT_CASES[head]
    ids, real = make_ids(RIGHT), RIGHT.bool()
    labels = torch.arange(ids.numel()).view(ids.shape) % 5
    labels[:, 0] = -100  # as the collator has it
    found = []
    for inputs in (
        flattened(RIGHT, labels),
        {"input_ids": ids, "attention_mask": RIGHT, "labels": labels.masked_fill(~real, -100)},
    ):
        if head != "token":
            del inputs["labels"]
        if head == "sequence":
            inputs["labels"] = torch.tensor([0, 2, 1, 1])
        model = load(model_class, dropout, **config).train()
        torch.manual_seed(3)
        outputs = model(**inputs)
        values = {
            name: value[real] if value.shape[:2] == real.shape else value.flatten(0, 1) if value.dim() == 3 else value
            for name, value in logits_of(outputs).items()
        }
        total = sum((value * random_weights(value)).sum() for value in values.values())
        (total if head == "model" else outputs.loss).backward()
        found.append((values, outputs.get("loss"), gradients(model)))
    for name, value in found[1][0].items():
        assert_close(found[0][0][name], value)
    if head != "model":
        assert_close(found[0][1], found[1][1])
    assert_same_gradients(found[0][2], found[1][2])


def test_sequences_without_tokens_in_packed_input(model):
    ids = make_ids()[:1, :9]
    arguments = {"max_length_q": 6, "output_attentions": True}
    plain = model(ids, cu_seq_lens_q=torch.tensor([0, 3, 9]), **arguments)
    outputs = model(ids, cu_seq_lens_q=torch.tensor([0, 0, 3, 3, 3, 9, 9]), **arguments)
    assert_close(outputs.last_hidden_state, plain.last_hidden_state)
    empty = torch.tanh(model.pooler.dense.bias)  # a pooler's answer to zeros
    expected = [empty, plain.pooler_output[0], empty, empty, plain.pooler_output[1], empty]
    assert_close(outputs.pooler_output, torch.stack(expected))
    for attention, of_plain in zip(outputs.attentions, plain.attentions, strict=True):
        assert_close(attention[[1, 4]], of_plain)
        assert not attention[[0, 2, 3, 5]].any()
    outputs.pooler_output.sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("head", LAYOUT_CASES)
def test_rows_without_tokens_are_finite_and_teach_nothing(head, dropout, packed):
    """Also where no row has any."""
    model_class, config = LAYOUT_CASES[head]
    shape = (2, 3, COLUMNS) if head == "choice" else (ROWS, COLUMNS)
    model = load(model_class, dropout, **config).train()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    for mask in (MASK, torch.zeros_like(MASK)):
        outputs = model(inputs_embeds=embeds.view(*shape, HIDDEN), attention_mask=mask.view(shape))
        values = logits_of(outputs)
        assert all(value.isfinite().all() for value in values.values())
        real = mask.bool() if "logits" not in values or head == "token" else mask.any(1)
        total = sum(
            (value[real] if value.shape[:2] == real.shape else value.view(ROWS, -1)[mask.any(1)]).square().sum()
            for value in values.values()
        )
        embeds.grad = None
        model.zero_grad()
        total.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
        assert not embeds.grad[~mask.any(1)].any()
        assert embeds.grad[mask.any(1)].any() == mask.any()
        if not mask.any():
            assert not any(gradient.any() for gradient in gradients(model).values())


def test_a_batch_without_rows(packed):
    for model_class, config in LAYOUT_CASES.values():
        model = load(model_class, **config)
        shape = (0, 3, COLUMNS) if model_class is ErnieMForMultipleChoice else (0, COLUMNS)
        for mode in (model.eval(), model.train()):
            outputs = mode(torch.zeros(shape, dtype=torch.long), attention_mask=torch.zeros(shape))
            assert all(value.shape[0] == 0 for value in logits_of(outputs).values())
            sum(value.sum() for value in logits_of(outputs).values()).backward()
            assert not any(gradient.any() for gradient in gradients(model).values())


def test_a_row_alone_equals_the_row_in_a_batch(model, packed):
    whole = model(IDS, attention_mask=MASK)
    for row in range(EMPTY):
        alone = model(IDS[row : row + 1], attention_mask=MASK[row : row + 1])
        assert_close(alone.last_hidden_state[0, REAL[row]], whole.last_hidden_state[row, REAL[row]])
        assert_close(alone.pooler_output[0], whole.pooler_output[row])
    if packed:
        assert not whole.last_hidden_state[~REAL].any()


def test_more_padding_changes_nothing(model, packed):
    """As `padding="max_length"` makes it."""
    ids = torch.full((ROWS, 512), PAD)
    ids[:, :COLUMNS] = IDS
    mask = torch.zeros_like(ids)
    mask[:, :COLUMNS] = MASK
    short, long = (model(*each).last_hidden_state for each in ((IDS, None, MASK), (ids, None, mask)))
    assert_close(long[:, :COLUMNS][REAL], short[REAL])


def test_a_batch_of_very_many_rows(model):
    rows = 3000
    mask = (torch.arange(5) < (torch.arange(rows) % 6)[:, None]).long()
    ids = make_ids(mask)
    with torch.inference_mode():
        whole = model(ids, attention_mask=mask)
        parts = [
            model(ids[start : start + 500], attention_mask=mask[start : start + 500]) for start in range(0, rows, 500)
        ]
    assert_close(whole.last_hidden_state, torch.cat([part.last_hidden_state for part in parts]))
    assert_close(whole.pooler_output, torch.cat([part.pooler_output for part in parts]))


def test_mean_pooling(packed):
    """As sentence embeddings are made: over states times mask."""
    model = load(add_pooling_layer=False)
    mask = MASK[:EMPTY]
    hidden = model(IDS[:EMPTY], attention_mask=mask).last_hidden_state
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.stack(
        [
            model(row[kept][None], position_ids=kept.nonzero().T).last_hidden_state[0].mean(0)
            for row, kept in zip(IDS, REAL[:EMPTY], strict=False)
        ]
    )
    assert_close(means, expected)
