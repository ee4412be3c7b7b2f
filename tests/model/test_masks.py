"""Masks, positions, embeddings and labels as users pass them."""

import pytest
import torch
from torch import nn

from erniem_fast import (
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)
from tests.model.tiny import (
    COLUMNS,
    EMPTY,
    HEADS,
    HIDDEN,
    IDS,
    MASK,
    REAL,
    ROWS,
    assert_close,
    assert_same_gradients,
    load,
    random_weights,
    set_packing,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64]


def to_add(mask, dtype, lowest):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, lowest)


MASKS_PER_QUERY = {
    **{f"3-D {dtype}": MASK[:, None, :].expand(-1, COLUMNS, -1).to(dtype) for dtype in DTYPES + FLOATS},
    **{f"4-D {dtype}": MASK[:, None, None, :].to(dtype) for dtype in DTYPES},
    "4-D for each head": MASK[:, None, None, :].expand(-1, HEADS, COLUMNS, -1),
    **{f"4-D {dtype} to add": to_add(MASK[:, None, None, :], dtype, torch.finfo(dtype).min) for dtype in FLOATS},
    "4-D of infinities to add": to_add(MASK[:, None, None, :], torch.float32, -torch.inf),
    "4-D of -1e9 to add": to_add(MASK[:, None, None, :], torch.float32, -1e9),
}


@pytest.mark.parametrize("name", MASKS_PER_QUERY)
def test_masks_per_query_equal_the_same_padding_mask(name, model, monkeypatch):
    """At padding too, which a mask per query computes; the row without tokens attends to nothing."""
    set_packing(monkeypatch, False)
    # A finite number to add leaves that row something to attend to.
    rows = EMPTY if "1e9" in name else ROWS
    found = []
    for mask in (MASKS_PER_QUERY[name], MASK):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        hidden = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        assert hidden.isfinite().all()
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden[:rows], embeds.grad[:rows]))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients({"embeds": found[0][1]}, {"embeds": found[1][1]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["3-D torch.bool", "4-D torch.int64", "4-D torch.float32 to add"])
def test_masks_per_query_in_half_precision(name, dtype, model):
    model.to(dtype)
    outputs, expected = (
        model(IDS, attention_mask=mask, output_attentions=True) for mask in (MASKS_PER_QUERY[name], MASK)
    )
    assert outputs.last_hidden_state.dtype == outputs.attentions[0].dtype == dtype
    # States are at most about 4; the two routes round in different places, once or twice a layer.
    atol = 8 * torch.finfo(dtype).eps
    assert_close(outputs.last_hidden_state[REAL], expected.last_hidden_state[REAL], atol)


def test_a_block_mask_equals_packed_input(model):
    """Two sequences in a row that do not see each other."""
    ids, block = IDS[:1], torch.zeros(1, COLUMNS, COLUMNS)
    block[:, :4, :4] = block[:, 4:, 4:] = 1
    positions = torch.tensor([[*range(4), *range(COLUMNS - 4)]])
    expected = model(ids, cu_seq_lens_q=torch.tensor([0, 4, COLUMNS]), max_length_q=COLUMNS - 4)
    outputs = model(ids, attention_mask=block, position_ids=positions)
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)


def test_a_mask_for_each_head(model):
    """A head that sees nothing adds nothing, as if it were masked by `head_mask`."""
    mask = torch.ones(ROWS, HEADS, COLUMNS, COLUMNS, dtype=torch.bool)
    mask[:, 1] = False
    ids = IDS.clamp(min=4)
    assert_close(
        model(ids, attention_mask=mask).last_hidden_state,
        model(ids, head_mask=torch.tensor([1.0, 0.0])).last_hidden_state,
    )


def test_a_bias_multiplies_probabilities(model):
    """Adding b to the scores makes the probabilities of the first layer proportional to what they were times e^b."""
    ids = IDS[:1]
    bias = torch.randn(1, HEADS, COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(4))
    without = model(ids, output_attentions=True).attentions[0]
    expected = without * bias.exp()
    actual = model(ids, attention_mask=bias, output_attentions=True).attentions[0]
    assert_close(actual, expected / expected.sum(-1, keepdim=True))
    shifted = model(ids, attention_mask=bias + 3.0).last_hidden_state
    assert_close(shifted, model(ids, attention_mask=bias).last_hidden_state)


def test_embeddings_in_place_of_ids(model, packed):
    words = model.get_input_embeddings()
    ids = IDS.clamp(min=4)
    assert_close(model(inputs_embeds=words(ids)).last_hidden_state, model(ids).last_hidden_state)
    outputs, expected = model(inputs_embeds=words(IDS), attention_mask=MASK), model(IDS, attention_mask=MASK)
    assert_close(outputs.last_hidden_state[REAL], expected.last_hidden_state[REAL])
    assert_close(outputs.pooler_output, expected.pooler_output)


def test_default_positions_are_columns(model, packed):
    """Also with left padding and holes."""
    columns = torch.arange(COLUMNS).expand(ROWS, -1)
    outputs, expected = model(IDS, columns, MASK), model(IDS, None, MASK)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    other = model(IDS, columns + 1, MASK).last_hidden_state
    assert (other - expected.last_hidden_state)[REAL].abs().max() > 0.1


def test_one_mask_row_for_all_rows(packed):
    """Losses too: each row counts."""
    ids = IDS.clamp(min=4)
    spans = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 2
    column = torch.arange(ROWS) % 4
    for model_class, labels in (
        (ErnieMForTokenClassification, {"labels": spans}),
        (ErnieMForQuestionAnswering, {"start_positions": column, "end_positions": column + 1}),
        (ErnieMForInformationExtraction, {"start_positions": spans, "end_positions": 1 - spans}),
        (ErnieMForInformationExtraction, {"start_positions": column, "end_positions": column + 1}),
    ):
        model = load(model_class)
        loss, expected = (
            model(ids, attention_mask=mask, **labels).loss for mask in (MASK[1:2], MASK[1:2].repeat(ROWS, 1))
        )
        assert_close(loss, expected)


def test_labels_at_padding_do_not_count():
    """In the packed layout, whatever they are."""
    for model_class in (ErnieMForTokenClassification, ErnieMForInformationExtraction):
        model = load(model_class)
        for bias in (parameter for name, parameter in model.named_parameters() if name.endswith("bias")):
            nn.init.normal_(bias)  # so that no label is as good as another where there is nothing but bias
        losses = []
        for label in (0, 1, 999):
            labels = torch.ones_like(IDS).masked_fill(~REAL, label)
            token = model_class is ErnieMForTokenClassification
            given = {"labels": labels} if token else {"start_positions": labels, "end_positions": labels}
            losses.append(model(IDS, attention_mask=MASK, **given).loss)
        assert losses[0] == losses[1] == losses[2]


def test_labels_that_are_no_classes():
    """What the losses of transformers take besides: the ignored one, numbers to regress to, several classes at once."""
    F = nn.functional
    values = torch.tensor([-7.0, 0.5, 3.0, 12.0, 1.0, 0.0])
    classes = torch.tensor([2, -100, 0, 1, -100, 2])
    several = torch.eye(3).repeat(2, 1)
    for settings, labels, expected in (
        ({"num_labels": 1}, values, lambda logits: F.mse_loss(logits[:, 0], values)),
        ({"num_labels": 1}, 9 * classes, lambda logits: F.mse_loss(logits[:, 0], 9.0 * classes)),
        ({"num_labels": 3}, several, lambda logits: F.binary_cross_entropy_with_logits(logits, several)),
        ({"num_labels": 3}, classes, lambda logits: F.cross_entropy(logits, classes)),
        (
            {"num_labels": 6, "problem_type": "regression"},
            values.expand(6, 6),
            lambda logits: F.mse_loss(logits, values.expand(6, 6)),
        ),
    ):
        model = load(ErnieMForSequenceClassification, **settings)
        outputs = model(IDS, attention_mask=MASK, labels=labels)
        assert_close(outputs.loss, expected(outputs.logits))
    model = load(ErnieMForMultipleChoice)
    outputs = model(IDS.view(2, 3, COLUMNS), MASK.view(2, 3, COLUMNS), labels=torch.tensor([-100, 2]))
    assert_close(outputs.loss, F.cross_entropy(outputs.logits[1:], torch.tensor([2])))


def test_information_extraction_takes_columns_of_any_integers():
    model = load(ErnieMForInformationExtraction)
    column = torch.tensor([3, 1, 4, 0, 10, 999])
    hot = torch.zeros(ROWS, COLUMNS).scatter(1, column.clamp(max=COLUMNS - 1)[:, None], 1.0)
    hot[EMPTY] = 0
    expected = model(IDS, attention_mask=MASK, start_positions=hot, end_positions=hot).loss
    for positions in (column, column.int(), column[:, None], column.short()):
        assert_close(model(IDS, attention_mask=MASK, start_positions=positions, end_positions=positions).loss, expected)


def test_choices_are_scored_one_by_one(packed):
    model = load(ErnieMForMultipleChoice)
    ids, mask = IDS.view(2, 3, COLUMNS), MASK.view(2, 3, COLUMNS)
    positions = torch.arange(COLUMNS).expand(2, 3, -1)
    outputs = model(
        ids, mask, positions, output_attentions=True, output_hidden_states=True, labels=torch.tensor([2, 0])
    )
    assert outputs.logits.shape == (2, 3)
    assert outputs.hidden_states[0].shape == (ROWS, COLUMNS, HIDDEN)
    assert outputs.attentions[0].shape == (ROWS, HEADS, COLUMNS, COLUMNS)
    assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, torch.tensor([2, 0])))
    for choice in range(3):
        alone = model(ids[:, choice : choice + 1], mask[:, choice : choice + 1])
        assert_close(alone.logits[0, 0], outputs.logits[0, choice])
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, outputs.logits)
