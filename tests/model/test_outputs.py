"""What a model returns, and copies of models."""

import copy
import dataclasses
import io
import pickle
import typing

import pytest
import torch

from erniem_fast import (
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
)
from tests.model.tiny import (
    COLUMNS,
    HEADS,
    HIDDEN,
    IDS,
    LAYOUT_CASES,
    MASK,
    REAL,
    RIGHT,
    ROWS,
    assert_close,
    flattened,
    load,
    make_ids,
    set_packing,
)


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
