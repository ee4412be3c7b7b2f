"""What users do with models of this family: layouts, masks, dtypes, modes, hooks, copies and graphs must all agree."""

import copy
import dataclasses
import io
import pickle
import typing

import pytest
import torch
from golden import cases
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DataCollatorWithFlattening

import erniem_fast
from erniem_fast import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    flags,
)

PAD, HEADS, HIDDEN = cases.PAD, 2, cases.HIDDEN
# One row each of: no padding, right padding, left padding, holes, one token at the end, no token at all.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
EMPTY = 5
ROWS, COLUMNS = MASK.shape
REAL = MASK.bool()
RIGHT = (torch.arange(COLUMNS) < torch.tensor([[11], [7], [4], [1]])).long()
# The layouts sum in another order: of values about 1, a hundred roundings of 1.2e-7.
ATOL = 1e-5


def make_ids(mask=MASK):
    ids = torch.randint(4, cases.VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(mask == 0, PAD)


IDS = make_ids()


def load(model_class=ErnieMModel, dropout=0.0, **config):
    """The tiny checkpoint; heads get weights of their own, the same every time."""
    torch.manual_seed(7)
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "act_dropout"), dropout)
    return model_class.from_pretrained(cases.TINY, **rates, classifier_dropout=0.0, **config).eval()


@pytest.fixture
def model():
    return load()


def set_packing(monkeypatch, packed):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "1" if packed else "0")


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_gradients(actual, expected, rtol=1e-5):
    """Of the model's largest gradient, so that one that cancels to zero is measured by something."""
    assert actual.keys() == expected.keys()
    scale = max(grad.abs().max() for grad in expected.values())
    for name in expected:
        error = (actual[name] - expected[name]).abs().max()
        assert error <= rtol * scale, f"gradient of {name} is off by {error / scale:.1e} of the largest"


def random_weights(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


class Calls(TorchDispatchMode):
    """Notes which operators run, and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        self.names.add(function.name())
        self.shapes |= {tuple(each.shape) for each in tree_leaves(results) if isinstance(each, torch.Tensor)}
        return results


# ---- Layouts


def logits_of(outputs):
    """What a head computes, with a dimension of columns where it has one; an encoder's states and pooled output."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return {name: outputs[name] for name in names if name in outputs}


LAYOUT_CASES = {
    "model": (ErnieMModel, {}),
    "sequence": (ErnieMForSequenceClassification, {"num_labels": 3}),
    "choice": (ErnieMForMultipleChoice, {}),
    "token": (ErnieMForTokenClassification, {"num_labels": 5}),
    "span": (ErnieMForQuestionAnswering, {}),
    "extraction": (ErnieMForInformationExtraction, {}),
}


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


def flattened(mask, labels=None):
    """The rows of a right-padded batch as the collator packs them."""
    rows = [row[kept.bool()].tolist() for row, kept in zip(make_ids(mask), mask, strict=True)]
    features = [{"input_ids": row} for row in rows]
    for index, feature in enumerate(features if labels is not None else []):
        feature["labels"] = labels[index, : len(rows[index])].tolist()
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    if labels is None:
        del batch["labels"]  # the collator makes some up
    return batch


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


# ---- Masks and inputs


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


# ---- Dtypes


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, model, packed):
    expected = model(IDS, attention_mask=MASK, output_hidden_states=True)
    half = copy.deepcopy(model).to(dtype)
    outputs = half(IDS, attention_mask=MASK, output_hidden_states=True)
    assert {state.dtype for state in (*outputs.hidden_states, outputs.pooler_output)} == {dtype}
    # Each of the 2 layer norms of 2 layers rounds its rows by half a unit; weights and products add as much.
    bound = 4 * torch.finfo(dtype).eps
    for state, of_float32 in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(state[REAL], of_float32[REAL]) < bound
    for each in (half, model):
        each.zero_grad()
        hidden = each(IDS, attention_mask=MASK).last_hidden_state[REAL]
        (hidden.float() * random_weights(hidden)).sum().backward()
    found, of_float32 = gradients(half), gradients(model)
    for name, gradient in of_float32.items():
        if "k_proj.bias" not in name:  # which cancels to zero
            assert found[name].dtype == dtype
            assert relative_error(found[name], gradient) < 4 * bound, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_with_dropout_is_finite(dtype, packed):
    model = load(ErnieMForTokenClassification, dropout=0.3).to(dtype).train()
    model(IDS, attention_mask=MASK, labels=torch.zeros_like(IDS)).loss.backward()
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients(model).values())


@pytest.mark.parametrize("attentions", [False, True])
def test_autocast(attentions, packed):
    """Dtypes as transformers 4.57.6 gives them: layer norms in float32, products in bfloat16."""
    model = load(ErnieMForSequenceClassification)
    found = []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoded = model.ernie_m(IDS, attention_mask=MASK, output_attentions=attentions, output_hidden_states=True)
            logits = model(IDS, attention_mask=MASK, output_attentions=attentions).logits
        if enabled:
            assert {state.dtype for state in encoded.hidden_states} == {torch.float32}
            assert encoded.pooler_output.dtype == logits.dtype == torch.bfloat16
        logits[:EMPTY].float().square().sum().backward()
        found.append((encoded.last_hidden_state[REAL], gradients(model)))
    (hidden, mixed), (expected, exact) = found
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < relative_error(hidden, expected) < 2 * eps
    for name, gradient in exact.items():
        if "k_proj.bias" not in name:
            assert mixed[name].dtype == torch.float32
            assert relative_error(mixed[name], gradient) < 8 * eps, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_against_differences_in_float64(dropout, packed):
    """Along a random direction of all parameters and the embeddings at once."""
    model = load(ErnieMForTokenClassification, dropout, num_labels=3).double().train()
    leaves = {"inputs_embeds": model.get_input_embeddings()(IDS).detach(), **dict(model.named_parameters())}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    generator = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in leaves.items()}

    def loss_at(step):
        moved = {name: leaf + step * direction[name] for name, leaf in leaves.items()}
        torch.manual_seed(3)
        inputs = {"inputs_embeds": moved.pop("inputs_embeds"), "attention_mask": MASK}
        return torch.func.functional_call(model, moved, (), inputs).logits[REAL].pow(3).sum()

    loss = loss_at(0.0)
    assert loss.dtype == torch.float64
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    slope = sum((grad * direction[name]).sum() for grad, name in zip(grads, leaves, strict=True) if grad is not None)
    step = 1e-6
    with torch.no_grad():
        differences = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert differences == pytest.approx(slope.item(), rel=1e-6)


def test_float64_agrees_with_float32(model, packed):
    expected = copy.deepcopy(model).double()(IDS, attention_mask=MASK).last_hidden_state
    assert expected.dtype == torch.float64
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state[REAL].double(), expected[REAL])


def test_a_dtype_may_change_between_forwards(model):
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float64, torch.float16):
            assert model.to(dtype)(IDS, attention_mask=MASK).last_hidden_state.dtype == dtype
    model.load_state_dict(load().state_dict())  # float16 again: rounded as `.half()` rounds
    halved = load().half()(IDS, attention_mask=MASK)[0]
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, halved, atol=8 * torch.finfo(torch.float16).eps)
    model.float().load_state_dict(load().state_dict())
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, expected)


# ---- Modes


def test_training_and_evaluation(packed):
    model = load(dropout=0.3)
    state = torch.get_rng_state()
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not draw random numbers"
    model.train()
    trained = []
    for _ in range(2):
        torch.manual_seed(3)
        trained.append([model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2)])
    assert torch.equal(trained[0][0], trained[1][0])
    assert torch.equal(trained[0][1], trained[1][1])
    assert not torch.equal(trained[0][0], trained[0][1])
    assert torch.equal(model.eval()(IDS, attention_mask=MASK).last_hidden_state, expected)


@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_dropout_keeps_the_mean(implementation):
    """Of many draws: the mean of the embeddings is what evaluation gives, off by as much as chance explains."""
    model, draws = load(dropout=0.3), 300
    arguments = {"input_ids": IDS[:1], "output_hidden_states": True}
    with torch.no_grad(), erniem_fast.use_kernels(embeddings=implementation):
        expected = model(**arguments).hidden_states[0]
        model.train()
        drawn = torch.stack([model(**arguments).hidden_states[0] for _ in range(draws)])
    deviations = (drawn.mean(0) - expected) / (drawn.std(0) / draws**0.5).clamp(min=1e-6)
    assert deviations.abs().mean() == pytest.approx((2 / torch.pi) ** 0.5, rel=0.1)
    assert (drawn == 0).float().mean() == pytest.approx(0.3, abs=0.01)


def test_dropout_modules_alone_in_training_draw_anew():
    """Monte Carlo dropout: an evaluated model whose dropouts are switched on."""
    model = load(dropout=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(3)
    first, second = (model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2))
    assert (first - second)[REAL].abs().max() > 0.1
    torch.manual_seed(3)
    assert torch.equal(model(IDS, attention_mask=MASK).last_hidden_state, first)
    torch.manual_seed(3)
    assert torch.equal(model.train()(IDS, attention_mask=MASK).last_hidden_state, first)


def test_dropout_modules_alone_in_evaluation_or_replaced_do_nothing():
    expected = load()(IDS, attention_mask=MASK).last_hidden_state
    model = load(dropout=0.3).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, expected)
    model = load(dropout=0.3).train()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_between_training_steps(mode, packed):
    found = []
    for evaluates in (True, False):
        model = load(ErnieMForSequenceClassification, num_labels=3).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(IDS, attention_mask=MASK, labels=torch.arange(ROWS) % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                with mode():
                    evaluated = model.eval()(IDS, attention_mask=MASK).logits
                    trained = model.train()(IDS, attention_mask=MASK).logits
                assert torch.equal(evaluated, trained)
        found.append(model.eval()(IDS, attention_mask=MASK).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attentions", [False, True])
def test_gradient_checkpointing(reentrant, attentions, packed):
    """With dropout: the backward runs every layer again and draws the masks of the forward.

    Bit for bit, except that a reentrant checkpoint's first run has no autograd: its products of few tokens are the
    native ones, which add up in another order.
    """
    found = []
    for checkpointing in (True, False):
        model, runs = load(ErnieMForTokenClassification, dropout=0.3).train(), []
        for layer in model.ernie_m.encoder.layers:
            layer.self_attn.self_attn.register_forward_hook(lambda *_, runs=runs, layer=layer: runs.append(layer))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.ernie_m.encoder.layers)
        torch.manual_seed(3)
        arguments = {"attention_mask": MASK, "output_attentions": attentions, "output_hidden_states": True}
        # The hook that checkpointing puts on the word embeddings keeps them out of the op, whose kernel may round
        # otherwise than this.
        with erniem_fast.use_kernels(embeddings="torch"):
            outputs = model(IDS, **arguments, labels=torch.zeros_like(IDS))
        outputs.loss.backward()
        layers = list(model.ernie_m.encoder.layers)
        assert runs == (layers + layers[::-1] if checkpointing else layers)
        found.append((outputs.loss, *outputs.hidden_states, *gradients(model).values()))
    assert len(found[0]) == len(found[1])
    if reentrant:
        for once, again in zip(*found, strict=True):
            assert_close(again, once, atol=1e-5 * max(1.0, once.abs().max().item()))
    else:
        assert all(map(torch.equal, *found))


def test_gradient_checkpointing_leaves_the_embeddings_whole():
    """transformers hooks the word table whenever checkpointing is enabled, which must not take the op apart."""
    model = load().train()
    model.gradient_checkpointing_enable()
    with Calls() as calls:
        model(IDS, attention_mask=MASK)
    assert "erniem_fast::embeddings" in calls.names


def test_checkpointing_of_a_frozen_model_with_input_gradients():
    """How adapters are trained: the hook on the word embeddings makes the checkpoints differentiable."""
    model = load(ErnieMForSequenceClassification).train()
    model.requires_grad_(False)
    model.ernie_m.encoder.layers[0].linear1.weight.requires_grad_()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, attention_mask=MASK).logits.square().sum().backward()
    expected = load(ErnieMForSequenceClassification).train()
    expected(IDS, attention_mask=MASK).logits.square().sum().backward()
    weight = "ernie_m.encoder.layers.0.linear1.weight"
    assert_same_gradients(gradients(model), {weight: gradients(expected)[weight]})


# ---- Changed models


def test_resized_embeddings(model, tmp_path, packed):
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).last_hidden_state
        model.resize_token_embeddings(cases.VOCABULARY + 10)
        assert model.config.vocab_size == cases.VOCABULARY + 10
        assert torch.equal(model(IDS, attention_mask=MASK).last_hidden_state, expected)
    added = IDS.clone()
    added[0, 3] = cases.VOCABULARY + 9
    model(added, attention_mask=MASK).last_hidden_state.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[-1].any()
    assert not gradient[-2].any()
    assert not gradient[PAD].any()
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path).eval()
    assert_close(again(added)[0], model(added)[0])
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"outside \[0, 100\)"):
        model(IDS)


class Doubled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


def test_other_word_embeddings_are_used(model, packed):
    words = model.get_input_embeddings().weight
    expected = model(inputs_embeds=2 * nn.functional.embedding(IDS, words), attention_mask=MASK).last_hidden_state
    table = nn.Embedding.from_pretrained(2 * words.detach(), freeze=False)
    subclass = Doubled.from_pretrained(words.detach(), freeze=False)
    hooked = nn.Embedding.from_pretrained(words.detach(), freeze=False)
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    for embeddings in (table, subclass, hooked):
        model.set_input_embeddings(embeddings)
        assert model.get_input_embeddings() is embeddings
        hidden = model(IDS, attention_mask=MASK).last_hidden_state
        assert_close(hidden[REAL], expected[REAL])
        hidden.square().sum().backward()
        assert embeddings.weight.grad.any()


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": None}, {"padding_idx": 7}, {"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}],
    ids=str,
)
def test_options_of_word_embeddings_are_obeyed(options, packed):
    """As they are where the module itself is called, because it is of a subclass."""
    words = load().get_input_embeddings().weight.detach()
    ids = IDS.clone()
    ids[0, :4], ids[0, 4:6] = 7, PAD
    found = []
    for embedding_class in (nn.Embedding, type("Subclass", (nn.Embedding,), {})):
        model = load()
        embeddings = embedding_class(*words.shape, _weight=words.clone(), **options)
        model.set_input_embeddings(embeddings)
        hidden = model(ids, attention_mask=MASK).last_hidden_state[REAL]
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden, embeddings.weight.grad.is_sparse, {"words": embeddings.weight.grad.to_dense()}))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert_same_gradients(found[0][2], found[1][2])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_word_table_costs_no_gradient(frozen, packed):
    """Which would be as large as the table: what most of a multilingual model is."""
    model = load()
    table = model.get_input_embeddings().weight.requires_grad_(not frozen)
    hidden = model(IDS, attention_mask=MASK).last_hidden_state
    with Calls() as calls:
        hidden.square().sum().backward()
    assert (tuple(table.shape) in calls.shapes) == (not frozen)
    assert model.embeddings.position_embeddings.weight.grad.any()


def test_a_hooked_word_table_sees_rows_of_ids(packed):
    """As in other models, so that a hook may count on three dimensions of its output, as NEFTune's does."""
    model, expected = load(), load()(IDS, attention_mask=MASK)
    table, seen = model.get_input_embeddings(), []
    table.register_forward_hook(lambda module, arguments, output: seen.append((*arguments, output)))
    outputs = model(IDS, attention_mask=MASK)
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)
    ((ids, output),) = seen
    computed = REAL | (torch.arange(REAL.shape[1]) == 0)  # the pooler reads the first column, whatever it is
    assert torch.equal(ids, IDS.masked_fill(~computed, model.config.pad_token_id) if packed else IDS)
    assert torch.equal(output, table.weight[ids])


@pytest.mark.parametrize("change", ["replaced", "hooked"])
def test_another_activation_is_obeyed(change, packed):
    """Also where a kernel would compute the one of the config."""
    model, expected = load(), load(hidden_act="relu")
    for layer in model.encoder.layers:
        if change == "replaced":
            layer.activation = torch.nn.ReLU()
        else:
            layer.activation.register_forward_hook(lambda module, arguments, output: arguments[0].relu())
    for rows in (slice(None), slice(1)):  # of one short row a layer is one native call
        outputs, others = (each(IDS[rows], attention_mask=MASK[rows]) for each in (model, expected))
        assert_close(outputs.last_hidden_state, others.last_hidden_state)


HOOKED = [
    "embeddings.position_embeddings",
    "embeddings.layer_norm",
    "encoder.layers.0.norm1",
    "encoder.layers.1.norm2",
    "encoder.layers.0.self_attn.self_attn.q_proj",
    "encoder.layers.0.self_attn.self_attn.v_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.0.linear1",
    "encoder.layers.1.linear2",
    "pooler.dense",
]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_called_and_obeyed(name, packed):
    """Those of a forward, which doubles what a module gives, as doubled weights would; and those of a backward."""
    model, expected = load(), load()
    module, called = model.get_submodule(name), []
    module.register_forward_hook(lambda module, arguments, output: 2 * output)
    module.register_full_backward_hook(lambda module, of_inputs, of_outputs: called.append(module))
    with torch.no_grad():
        for parameter in expected.get_submodule(name).parameters():
            parameter.mul_(2)
    outputs, doubled = model(IDS, attention_mask=MASK), expected(IDS, attention_mask=MASK)
    assert_close(outputs.last_hidden_state[REAL], doubled.last_hidden_state[REAL])
    assert_close(outputs.pooler_output[:EMPTY], doubled.pooler_output[:EMPTY])
    outputs.pooler_output.sum().backward()
    assert called == [module]


def test_pruned_heads_survive_saving(tmp_path):
    for model_class in (ErnieMModel, ErnieMForTokenClassification):
        model = load(model_class)
        model.prune_heads({0: [1]})
        model.prune_heads({0: [1], 1: [0]})
        assert model.config.pruned_heads == {0: [1], 1: [0]}
        model.save_pretrained(tmp_path)
        again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert again.config.pruned_heads == {0: [1], 1: [0]}
        assert_close(again.eval()(IDS, attention_mask=MASK)[0], model(IDS, attention_mask=MASK)[0])
        assert again.base_model.encoder.layers[0].self_attn.self_attn.q_proj.weight.shape == (HIDDEN // HEADS, HIDDEN)


def test_masked_heads_equal_pruned_heads(packed):
    """Values, and the gradients of all that is left."""
    found = []
    for pruned in (True, False):
        model = load()
        head_mask = None if pruned else torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        if pruned:
            model.prune_heads({0: [1], 1: [0]})
        hidden = model(IDS, attention_mask=MASK, head_mask=head_mask).last_hidden_state[REAL]
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden, model.encoder.layers[0].linear1.weight.grad))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients({"linear1": found[0][1]}, {"linear1": found[1][1]})


def test_a_pruned_model_takes_a_head_mask():
    """Of the unpruned model's shape; it says nothing new of heads that are gone."""
    model = load()
    model.prune_heads({0: [0]})
    head_mask = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
    outputs = model(IDS, attention_mask=MASK, head_mask=head_mask, output_attentions=True)
    expected = load()(IDS, attention_mask=MASK, head_mask=head_mask, output_attentions=True)
    assert_close(outputs.last_hidden_state[REAL], expected.last_hidden_state[REAL])
    assert_close(outputs.attentions[0], expected.attentions[0][:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pruning_keeps_the_dtype(dtype):
    model = load().to(dtype)
    model.prune_heads({0: [1]})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(IDS, attention_mask=MASK).last_hidden_state.dtype == dtype


@pytest.mark.parametrize("attentions", [False, True])
def test_the_importance_of_heads(attentions, packed):
    """The gradient of a head mask, as pruning methods take it, against a difference."""
    model = load().double()

    def loss_at(mask):
        outputs = model(IDS, attention_mask=MASK, head_mask=mask, output_attentions=attentions)
        return outputs.last_hidden_state[REAL].pow(3).sum()

    mask = torch.ones(2, HEADS, dtype=torch.float64, requires_grad=True)
    loss_at(mask).backward()
    step = torch.zeros_like(mask)
    step[0, 1] = 1e-5
    with torch.no_grad():
        difference = (loss_at(mask + step) - loss_at(mask - step)) / 2e-5
    assert mask.grad[0, 1].item() == pytest.approx(difference.item(), rel=1e-6)


def test_subclasses_of_heads_keep_their_losses():
    """transformers 5 picks losses by a class's name."""
    column = torch.arange(ROWS) % 2
    for model_class, labels in (
        (ErnieMForSequenceClassification, {"labels": column}),
        (ErnieMForTokenClassification, {"labels": IDS % 2}),
        (ErnieMForQuestionAnswering, {"start_positions": column, "end_positions": column}),
        (ErnieMForInformationExtraction, {"start_positions": column, "end_positions": column}),
        (ErnieMForMultipleChoice, {"labels": column[:2]}),
    ):
        ids = IDS.clamp(min=4).view(2, 3, COLUMNS) if model_class is ErnieMForMultipleChoice else IDS.clamp(min=4)
        subclass = type("Detector", (model_class,), {})
        assert_close(load(subclass)(ids, **labels).loss, load(model_class)(ids, **labels).loss)


def test_new_models_are_initialised():
    """As BERT's: normal weights, no biases, layer norms that change nothing, a padding row of zeros."""
    torch.manual_seed(0)
    config = ErnieMConfig(
        vocab_size=1000, hidden_size=64, num_attention_heads=4, intermediate_size=128, initializer_range=0.05
    )
    for model in (ErnieMForSequenceClassification(config), ErnieMForInformationExtraction(config)):
        for name, weights in model.state_dict().items():
            if "norm" in name:
                assert (weights == (1.0 if name.endswith("weight") else 0.0)).all(), name
            elif name.endswith("bias"):
                assert not weights.any(), name
            else:
                # Four standard errors of a normal distribution's standard deviation.
                assert weights.std().item() == pytest.approx(0.05, rel=4 / (2 * weights.numel()) ** 0.5), name
        assert not model.ernie_m.embeddings.word_embeddings.weight[PAD].any()


# ---- Outputs


def test_attentions_are_probabilities(model, packed):
    outputs = model(IDS, attention_mask=MASK, output_attentions=True)
    assert_close(outputs.last_hidden_state[REAL], model(IDS, attention_mask=MASK).last_hidden_state[REAL])
    for attention in outputs.attentions:
        assert attention.shape == (ROWS, HEADS, COLUMNS, COLUMNS)
        assert_close(attention.sum(-1).transpose(1, 2)[REAL], torch.ones(int(REAL.sum()), HEADS))
        assert (attention >= 0).all()
        assert not attention.masked_select(~REAL[:, None, None, :]).any(), "attention to padding"


def test_attentions_of_both_layouts_agree(model, monkeypatch):
    found = []
    for packed in (True, False):
        set_packing(monkeypatch, packed)
        attentions = model(IDS, attention_mask=MASK, output_attentions=True).attentions
        found.append(torch.stack(attentions).transpose(2, 3)[:, REAL])
    assert_close(*found)


def test_attentions_of_input_that_comes_packed(model):
    lengths = RIGHT.sum(1)
    expected = model(make_ids(RIGHT), attention_mask=RIGHT, output_attentions=True).attentions
    outputs = model(**flattened(RIGHT), output_attentions=True, output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [(1, int(lengths.sum()), HIDDEN)] * 3
    for attention, of_padded in zip(outputs.attentions, expected, strict=True):
        assert_close(attention, of_padded)


def test_the_config_decides_what_is_returned():
    for model_class, config in LAYOUT_CASES.values():
        ids = IDS.view(2, 3, COLUMNS) if model_class is ErnieMForMultipleChoice else IDS
        model = load(model_class, **config, output_hidden_states=True, output_attentions=True)
        outputs = model(ids)
        assert (len(outputs.hidden_states), len(outputs.attentions)) == (3, 2)
        assert isinstance(model(ids, return_dict=False), tuple)
        outputs = model(ids, output_hidden_states=False, output_attentions=False)
        assert "hidden_states" not in outputs
        assert "attentions" not in outputs
        model = load(model_class, **config, return_dict=False)
        assert isinstance(model(ids), tuple)
        assert torch.equal(model(ids)[0], model(ids, return_dict=True)[0])


def test_a_pooler_that_no_loss_reads_is_only_carried_along(tmp_path, packed):
    model = load(ErnieMForInformationExtraction)
    model.ernie_m.pooler.register_forward_hook(lambda *_: pytest.fail("the pooler runs"))
    assert model(IDS, attention_mask=MASK).start_logits.isfinite().all()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    model.half().save_pretrained(tmp_path)
    carried, original = ErnieMModel.from_pretrained(tmp_path).pooler, load().half().pooler
    assert all(parameter.requires_grad for parameter in carried.parameters())
    for name, weights in original.state_dict().items():
        assert torch.equal(carried.state_dict()[name], weights)


def test_forwards_say_what_they_return():
    """By a dataclass whose fields other libraries read, such as sentence-transformers; or a tuple of their values."""
    for model_class, config in LAYOUT_CASES.values():
        output, other = typing.get_args(typing.get_type_hints(model_class.forward)["return"])
        assert dataclasses.is_dataclass(output)
        assert other is tuple
        ids = IDS.view(2, 3, COLUMNS) if model_class is ErnieMForMultipleChoice else IDS
        model = load(model_class, **config)
        assert type(model(ids)) is output
        assert type(model(ids, return_dict=False)) is tuple


# ---- Copies


def test_copies_compute_the_same(packed):
    model = load(ErnieMForSequenceClassification, num_labels=3)
    expected = model(IDS, attention_mask=MASK).logits

    def saved_whole(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_whole(model)):
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert_close(copied(IDS, attention_mask=MASK).logits, expected)
        with torch.no_grad():
            copied.ernie_m.encoder.layers[0].self_attn.self_attn.q_proj.weight.mul_(2)
        assert not torch.equal(copied(IDS, attention_mask=MASK).logits, expected)
        assert torch.equal(model(IDS, attention_mask=MASK).logits, expected), "copies share weights"


def test_a_state_dict_is_loaded_into_another_model():
    source, target = load(ErnieMForTokenClassification, num_labels=5), load(ErnieMForTokenClassification, num_labels=5)
    with torch.no_grad():
        target(IDS, attention_mask=MASK)
        for parameter in source.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(target(IDS, attention_mask=MASK).logits, source(IDS, attention_mask=MASK).logits)
        target.load_state_dict(source.state_dict())
        assert_close(target(IDS, attention_mask=MASK).logits, source(IDS, attention_mask=MASK).logits)


# ---- Transforms


def embedded(model):
    return model.embeddings.word_embeddings(IDS).detach()


def of_embeddings(model):
    """The sum of cubed states as a function of the embeddings."""
    return lambda embeds: model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state.pow(3).sum()


def along(function, embeds, direction, step=1e-6):
    """The derivative of a function in float64, by differences."""
    embeds, direction = embeds.double(), direction.double()
    return (function(embeds + step * direction) - function(embeds - step * direction)) / (2 * step)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_derivatives(mode, frozen, model, packed, kernels):
    model.requires_grad_(not frozen)
    embeds = embedded(model)
    direction = random_weights(embeds)
    with mode():
        _, transformed = torch.func.jvp(of_embeddings(model), (embeds,), (direction,))
        with forward_ad.dual_level():
            value = of_embeddings(model)(forward_ad.make_dual(embeds, direction))
            dual = forward_ad.unpack_dual(value).tangent
    expected = along(of_embeddings(model.double()), embeds, direction).item()
    assert transformed.item() == pytest.approx(expected, rel=1e-4)
    assert dual.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_by_torch_func(dropout, packed, kernels):
    model = load(ErnieMForSequenceClassification, num_labels=3, dropout=dropout).train()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.arange(ROWS) % 3}
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    torch.manual_seed(3)
    found = torch.func.grad(lambda these: torch.func.functional_call(model, these, (), inputs).loss)(parameters)
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    assert_same_gradients(found, gradients(model))


def test_second_derivatives(model, packed, kernels):
    """By torch.func against differences; by two backwards they are refused."""
    embeds = embedded(model)
    direction = random_weights(embeds)
    found = torch.func.grad(lambda x: (torch.func.grad(of_embeddings(model))(x) * direction).sum())(embeds)
    of_double = torch.func.grad(of_embeddings(copy.deepcopy(model).double()))
    expected = along(of_double, embeds, direction).detach()
    assert_close(found.detach().double(), expected, atol=1e-4 * expected.abs().max().item())
    embeds.requires_grad_()
    (grad,) = torch.autograd.grad(of_embeddings(model)(embeds), embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="gives no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_vmap(mode, packed, kernels):
    """Over the parameters of several models, and over embeddings; not over what decides which tokens there are."""
    models = [load(), load()]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    stacked, _ = torch.func.stack_module_state(models)
    inputs = {"input_ids": IDS, "attention_mask": MASK}

    def states(parameters):
        return torch.func.functional_call(models[0], parameters, (), inputs).last_hidden_state

    rows = embedded(models[0])
    with mode():
        for found, each in zip(torch.vmap(states)(stacked), models, strict=True):
            assert_close(found, each(**inputs).last_hidden_state)
        found = torch.vmap(lambda row: models[0](inputs_embeds=row[None]).last_hidden_state[0])(rows)
        assert_close(found, models[0](inputs_embeds=rows).last_hidden_state)
        with pytest.raises(ValueError, match="input_ids is mapped over by"):
            torch.vmap(lambda row: models[0](row[None]).last_hidden_state)(IDS)


# ---- torch.compile


@pytest.fixture
def compiler():
    """torch._dynamo's counters, from zero."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


def assert_compiled_equals_eager(compiled, model, batch):
    found = []
    for each in (compiled, model):
        model.zero_grad()
        torch.manual_seed(3)
        values = logits_of(each(**batch))
        sum((value * random_weights(value)).sum() for value in values.values()).backward()
        found.append((values, gradients(model)))
    for name, value in found[1][0].items():
        assert_close(found[0][0][name], value)
    assert_same_gradients(found[0][1], found[1][1])


def packed_batches(counts):
    generator = torch.Generator().manual_seed(2)
    for tokens in counts:
        bounds = torch.tensor([0, tokens // 3, tokens // 2, tokens], dtype=torch.int32)
        ids = torch.randint(4, cases.VOCABULARY, (1, tokens), generator=generator)
        yield {"input_ids": ids, "cu_seq_lens_q": bounds, "max_length_q": tokens - tokens // 2}


@pytest.mark.parametrize(
    ("model_class", "dropout", "dynamic", "graphs"),
    [(ErnieMModel, 0.3, None, 2), (ErnieMForTokenClassification, 0.0, True, 1)],
    ids=["model", "head"],
)
def test_one_graph_for_packed_input_of_any_size(model_class, dropout, dynamic, graphs, compiler):
    """Without breaks, forward and backward; with automatic dynamic shapes after a first one for a first size."""
    model = load(model_class, dropout=dropout).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in packed_batches([12, 19, 30, 31, 64]):
        assert_compiled_equals_eager(compiled, model, batch)
    assert compiler["stats"]["unique_graphs"] == graphs
    assert not compiler["graph_break"]


@pytest.mark.parametrize("model_class", [ErnieMForTokenClassification, ErnieMForSequenceClassification])
def test_a_loss_inside_the_graph(model_class, compiler):
    # Where it is None the first loss sets the problem type, and the second would need another graph.
    model = load(model_class, num_labels=3, problem_type="single_label_classification").train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in packed_batches([12, 19]):
        found = []
        labels = batch["input_ids"] % 3 if model_class is ErnieMForTokenClassification else torch.tensor([2, 0, -100])
        for each in (compiled, model):
            model.zero_grad()
            loss = each(**batch, labels=labels).loss
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        assert_close(found[0][0], found[1][0])
        assert_same_gradients(found[0][1], found[1][1])
    assert compiler["stats"]["unique_graphs"] == 1


def test_a_compiled_model_on_padded_input(packed, compiler):
    """With breaks around what only the host can know."""
    model = load()
    compiled = torch.compile(model, backend="aot_eager")
    for columns in (COLUMNS, 7):
        ids, mask = IDS[:, :columns], MASK[:, :columns]
        hidden, expected = (each(ids, attention_mask=mask).last_hidden_state for each in (compiled, model))
        assert_close(hidden[mask.bool()], expected[mask.bool()])


def test_a_model_compiled_by_inductor(compiler, tmp_path, monkeypatch):
    # Inductor's own cache would give code for another CPU capability, which it does not tell apart (seen in 2.13).
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = load()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in packed_batches([12, 19, 30]):
        assert_compiled_equals_eager(compiled, model, batch)
    assert compiler["stats"]["unique_graphs"] == 1


def test_every_implementation_of_every_op_agrees(model, packed, monkeypatch):
    """The whole model by the reference, and each op verified beside it."""
    found = []
    for implementation in ("reference", "torch", "auto"):
        if implementation == "auto":
            monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
        ops = dict.fromkeys(flags.OPS, implementation)
        model.zero_grad()
        with flags.use_implementations(**ops):
            hidden = model(IDS, attention_mask=MASK).last_hidden_state
            hidden[REAL].square().sum().backward()
        found.append((hidden[REAL], gradients(model)))
    for hidden, grads in found[1:]:
        assert_close(hidden, found[0][0])
        assert_same_gradients(grads, found[0][1])
