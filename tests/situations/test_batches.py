"""Situations of batches and masks: their order, single tokens, views, results that are kept, causal masks."""

import pytest
import torch
from torch import nn

from erniem_fast import ErnieMModel
from tests.golden import cases
from tests.model.tiny import LAYOUT_CASES, RIGHT, assert_close, load, logits_of, random_weights
from tests.situations.truths import BATCH, COLUMNS, FULL, IDS, MASK, REAL, ROWS, batch_for, peer_of, small_config


def test_the_order_of_rows_does_not_matter():
    order = torch.tensor([2, 0, 3, 1, 2])
    outputs, expected = load()(IDS[order], attention_mask=MASK[order]), load()(**BATCH)
    assert_close(outputs.last_hidden_state, expected.last_hidden_state[order])
    assert_close(outputs.pooler_output, expected.pooler_output[order])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_rows_that_are_no_numbers_stay_alone(value):
    """And what stands at padding is not read."""
    model = load()
    embeds = model.get_input_embeddings()(IDS).detach()
    expected = model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state
    spoilt = embeds.masked_fill(~REAL[..., None], value)
    assert_close(model(inputs_embeds=spoilt, attention_mask=MASK).last_hidden_state, expected)
    spoilt[1] = float("nan")
    outputs = model(inputs_embeds=spoilt, attention_mask=MASK).last_hidden_state
    assert outputs[1, REAL[1]].isnan().all()
    others = [0, 2, 3]
    assert_close(outputs[others], expected[others])


@pytest.mark.parametrize("head", LAYOUT_CASES)
def test_one_row_of_one_token(head):
    """No dimension is squeezed away."""
    model_class, config = LAYOUT_CASES[head]
    model, single = load(model_class, **config), slice(3, 4)
    assert RIGHT[single].sum() == 1
    batch = batch_for(model)
    alone = logits_of(model(batch["input_ids"][..., single, :1]))
    for name, value in logits_of(model(**batch)).items():
        expected = value[:, single] if head == "choice" else value[single]
        per_token = expected.dim() > 1 and expected.shape[1] == COLUMNS
        assert_close(alone[name], expected[:, :1] if per_token else expected)


def test_views_as_inputs():
    """Every second column or row, transposed, repeated without a copy."""
    model, mask = load(), MASK[:1].expand(ROWS, -1)
    for ids in (IDS[:, ::2], IDS[::2], IDS.t().contiguous().t(), IDS[:1].expand(3, -1)):
        assert_close(model(ids).last_hidden_state, model(ids.clone().contiguous()).last_hidden_state)
    outputs, expected = model(FULL, attention_mask=mask), model(FULL, attention_mask=mask.contiguous())
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)


def test_results_are_the_callers_to_keep():
    """Later calls, of this model and of others with other sizes, write to none of them."""
    models = [load(), ErnieMModel(small_config(96, 3, 40)).eval(), ErnieMModel(small_config(32, 2, 200)).eval()]
    kept = []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            for columns in (6, 11, 3):
                for model in models:
                    ids = FULL[:3, :columns] % 46 + 4
                    outputs = model(ids, output_hidden_states=True, output_attentions=True)
                    results = [*outputs.hidden_states, *outputs.attentions, outputs.pooler_output]
                    kept.append((results, [each.clone() for each in results]))
                    assert all(each.is_contiguous() for each in outputs.hidden_states)
    for results, copies in kept:
        assert all(map(torch.equal, results, copies))


def test_a_longer_table_of_positions():
    """Put in by hand, as models for long texts are made."""
    model = load()
    table = nn.Embedding(1026, cases.HIDDEN, padding_idx=1)
    with torch.no_grad():
        table.weight[: model.config.max_position_embeddings] = model.embeddings.position_embeddings.weight
    model.embeddings.position_embeddings, model.config.max_position_embeddings = table, 1026
    ids = torch.randint(4, cases.VOCABULARY, (2, 700), generator=torch.Generator().manual_seed(0))
    ids[1, 600:] = cases.PAD
    with torch.no_grad():
        outputs, expected = model(ids).last_hidden_state, peer_of(model)(ids, ids != cases.PAD).last_hidden_state
    assert_close(outputs[ids != cases.PAD], expected[ids != cases.PAD])


def test_under_a_causal_mask_a_prefix_is_all_there_is():
    model, mask = load(), torch.ones(ROWS, COLUMNS, COLUMNS).tril()
    whole = model(FULL, attention_mask=mask).last_hidden_state
    for length in (1, 7):
        prefix = model(FULL[:, :length], attention_mask=mask[:, :length, :length]).last_hidden_state
        assert_close(whole[:, :length], prefix)


def test_a_bias_of_the_scores_can_be_learnt():
    model = load().double()
    shape = (1, model.config.num_attention_heads, COLUMNS, COLUMNS)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    direction = random_weights(bias).double()

    def loss_at(bias):
        return model(FULL, attention_mask=bias).last_hidden_state.pow(3).sum()

    (gradient,) = torch.autograd.grad(loss_at(bias), bias)
    with torch.no_grad():
        difference = (loss_at(bias + 1e-6 * direction) - loss_at(bias - 1e-6 * direction)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
