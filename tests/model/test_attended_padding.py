"""UIE-M's attention: rows as if padded to a fixed length, with padding attended to and [CLS] not.

The truth is an encoder in plain PyTorch on rows that are really padded.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from erniem_fast import ErnieMConfig, ErnieMForInformationExtraction, ErnieMModel, optimize
from erniem_fast.native import library
from tests.integration.test_export import load as load_small
from tests.model.tiny import (
    COLUMNS,
    HIDDEN,
    IDS,
    MASK,
    PAD,
    REAL,
    ROWS,
    assert_same_gradients,
    gradients,
    load,
    random_weights,
    set_packing,
)
from tests.one_calls import record
from tests.products import products_by

LENGTH = 30
# One more [CLS], and one that is padding by the mask.
UIE_IDS = IDS.clone()
UIE_IDS[:, 0] = 0
UIE_IDS[2, 5] = 0
UIE_IDS[3, 1] = 0
# The logarithm of the padding's number is rounded to float32, by up to 2^-23, and so is the weight of the padding: in
# float64 that is all. In float32 both forms round. Seen, as distances from float64 of (this form, rows that are really
# padded) and between both: the tiny model padded to 30 (3.0e-6, 2.0e-6) and 1.7e-6; to 512, where sums over 505 equal
# keys round most, (1.3e-6, 4.5e-6) and 5.3e-6; base with random weights of 0.05, padded to 512, (1.9e-5, 1.8e-5) and
# 2.5e-5. So this form may be twice as far from float64 as really padded rows are, as any kernel from its reference.
EXACT = 1e-6


def load_uie(model_class=ErnieMModel, dropout=0.0, **config):
    return load(model_class, dropout, uie_padded_length=LENGTH, **config)


def really_padded(ids=UIE_IDS, real=REAL, length=LENGTH):
    """Ids and positions of the rows with padding up to the length, all in position 0."""
    more = length - ids.shape[1]
    positions = torch.arange(ids.shape[1]).expand_as(ids).where(real, 0)
    return F.pad(ids.where(real, PAD), (0, more), value=PAD), F.pad(positions, (0, more))


def plain(model, ids, positions):
    """The hidden states of all layers, `(rows, columns, hidden)` each, where all ids but 0 are attended to."""
    embeddings, heads = model.embeddings, model.config.num_attention_heads

    def norm(module, x):
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    def linear(module, x):
        return F.linear(x, module.weight, module.bias)

    x = embeddings.word_embeddings.weight[ids] + embeddings.position_embeddings.weight[positions + 2]
    states = [norm(embeddings.layer_norm, x)]
    for layer in model.encoder.layers:
        x, attention = states[-1], layer.self_attn.self_attn
        query, key, value = (
            linear(each, x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        probabilities = scores.masked_fill((ids == 0)[:, None, None], -torch.inf).softmax(-1)
        context = (probabilities @ value).transpose(1, 2).flatten(2)
        x = norm(layer.norm1, x + linear(layer.self_attn.out_proj, context))
        states.append(norm(layer.norm2, x + linear(layer.linear2, F.gelu(linear(layer.linear1, x)))))
    return states


def assert_exact(result, truth, padded):
    """`padded`, of the dtype of the result, and `truth`, in float64, are of the same really padded rows."""
    rounding = (padded.double() - truth).abs().max().item()
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=EXACT + 2 * rounding)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_is_that_of_rows_padded_to_the_length(dtype, packing, kernels, monkeypatch):
    """Right, left and no padding, holes, and a row without tokens; in the padded layout at padding too."""
    set_packing(monkeypatch, packing)
    model = load_uie().to(dtype)
    truth = plain(model.double(), *really_padded())
    padded = plain(model.to(dtype), *really_padded())
    out = model(UIE_IDS, attention_mask=MASK, output_hidden_states=True)
    with torch.inference_mode():
        last = model(UIE_IDS, attention_mask=MASK).last_hidden_state
    shown = torch.where(REAL, True, not packing)[..., None]
    for state, *references in zip((*out.hidden_states, last), (*truth, truth[-1]), (*padded, padded[-1]), strict=True):
        assert state.is_contiguous()
        assert_exact(state, *(torch.where(shown, each[:, :COLUMNS], 0.0) for each in references))


def test_rows_that_come_padded_to_the_length_and_longer_ones(kernels):
    """By their ids alone; a row of the length has no padding, and a longer one has none either."""
    ids, positions = really_padded()
    ids[4] = ids[4].clamp(min=5)
    positions[4] = torch.arange(LENGTH)
    model = load_uie()
    references = [plain(each, ids, positions)[-1] for each in (model.double(), copy.deepcopy(model).float())]
    out = model.float()(ids, position_ids=positions).last_hidden_state
    assert_exact(out, *(torch.where((ids != PAD)[..., None], each, 0.0) for each in references))

    model.config.uie_padded_length = LENGTH - 1
    assert_exact(model(ids, position_ids=positions).last_hidden_state[4], *(each[4] for each in references))


def test_the_real_length():
    """512, of few tokens: what UIE-M's pipeline has for a sentence."""
    model = load(uie_padded_length=512)
    ids, real = UIE_IDS[:1, :7], REAL[:1, :7]
    rows = really_padded(ids, real, 512)
    references = [plain(each, *rows)[-1][:, :7] for each in (model.double(), copy.deepcopy(model).float())]
    assert_exact(model.float()(ids).last_hidden_state, *references)


def test_attentions_are_those_to_real_tokens():
    """The columns are the input's; what is missing to 1 is the padding's."""
    out = load_uie()(UIE_IDS, attention_mask=MASK, output_attentions=True)
    for probabilities in out.attentions:
        assert probabilities.shape == (ROWS, 2, COLUMNS, COLUMNS)
        assert not probabilities[:, :, :, 0].any()
        sums = probabilities.sum(-1).transpose(1, 2)[REAL]
        assert bool(((sums > 0) & (sums < 1)).all())


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_gradients_are_those_of_rows_padded_to_the_length(packing, kernels, monkeypatch):
    set_packing(monkeypatch, packing)
    model = load_uie(add_pooling_layer=False).double().train()
    weights = random_weights(UIE_IDS[..., None].expand(-1, -1, HIDDEN)).double() * REAL[..., None]
    (plain(model, *really_padded())[-1][:, :COLUMNS] * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    (model(UIE_IDS, attention_mask=MASK).last_hidden_state * weights).sum().backward()
    actual = gradients(model)
    for grads in (expected, actual):
        grads["embeddings.word_embeddings.weight"][PAD] = 0.0  # padding_idx, which the plain one does not know
        grads["embeddings.position_embeddings.weight"][PAD] = 0.0
    assert_same_gradients(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_equals_padded_in_training(dropout, monkeypatch):
    """With dropout too: the padding that stands for all has the same place in both layouts."""
    found = []
    for packing in (True, False):
        set_packing(monkeypatch, packing)
        model = load_uie(ErnieMForInformationExtraction, dropout).train()
        torch.manual_seed(3)
        out = model(UIE_IDS, attention_mask=MASK)
        logits = torch.stack([out.start_logits, out.end_logits])[:, REAL]
        (logits * random_weights(logits)).sum().backward()
        found.append((logits, gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_layers_are_one_native_call(weights, monkeypatch):
    """With a token more in each row, and the results of ops one by one."""
    model = load_uie()
    if weights == "int8":
        optimize(model, weights="int8")
    with products_by("native"), torch.inference_mode():
        expected = model(UIE_IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[-1]
        calls = record(monkeypatch)
        out = model(UIE_IDS, attention_mask=MASK).last_hidden_state
    # Rows 2 and 4 do not begin with a real token, but the pooler reads it; row 5 begins with its padding.
    assert calls == [(int(MASK.sum()) + ROWS + 2, len(model.encoder.layers))]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_exported_graphs_attend_to_padding():
    """For other sizes than the example's."""
    model = load_small(uie_padded_length=LENGTH, add_pooling_layer=False)
    rows, columns = torch.export.Dim("rows", max=64), torch.export.Dim("columns", max=28)
    example = {"input_ids": UIE_IDS[:2, :7].contiguous(), "attention_mask": MASK[:2, :7].contiguous()}
    shapes = {name: {0: rows, 1: columns} for name in example}
    graph = torch.export.export(model, (), example, dynamic_shapes=shapes).module()
    (exported, *_), (eager, *_) = (each(input_ids=UIE_IDS, attention_mask=MASK) for each in (graph, model))
    torch.testing.assert_close(exported, eager, rtol=0, atol=1e-5)


def test_a_mask_per_query_says_itself_what_is_attended_to():
    mask = MASK[:, None, :].expand(-1, COLUMNS, -1)
    expected, out = (each(UIE_IDS, attention_mask=mask).last_hidden_state for each in (load(), load_uie()))
    assert torch.equal(out, expected)


def test_input_without_ids_or_rows_is_refused():
    model = load_uie()
    with pytest.raises(ValueError, match=rf"inputs_embeds cannot be used with uie_padded_length={LENGTH}, .*ids"):
        model(inputs_embeds=torch.zeros(1, 3, HIDDEN))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q cannot be used with .* pass attention_mask"):
        model(UIE_IDS[:1], cu_seq_lens_q=torch.tensor([0, COLUMNS]), max_length_q=COLUMNS)


def test_the_config_keeps_it(tmp_path):
    ErnieMConfig(uie_padded_length=512).save_pretrained(tmp_path)
    assert ErnieMConfig.from_pretrained(tmp_path).uie_padded_length == 512
    assert ErnieMConfig().uie_padded_length is None
    with pytest.raises(ValueError, match="uie_padded_length=0 is not a length; use UIE-M's 512, or None"):
        ErnieMConfig(uie_padded_length=0)
