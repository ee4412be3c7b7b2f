"""ErnieMConfig: defaults, names, round trips, and which values it refuses."""

import dataclasses
import json
import typing

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, BertConfig

import erniem_fast
from erniem_fast import ErnieMConfig, ErnieMModel
from tests.golden import cases

SMALL = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def test_defaults_are_those_of_ernie_m_base():
    """As transformers 4.57.6 has them."""
    expected = {
        "vocab_size": 250002,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 514,
        "initializer_range": 0.02,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-05,
        "classifier_dropout": None,
        "act_dropout": 0.0,
    }
    config = ErnieMConfig()
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.num_labels == 2
    assert config.model_type == "ernie_m"


@pytest.mark.parametrize("load", [ErnieMConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_file_of_transformers_4_is_read_whole(load):
    saved = json.loads((cases.TINY / "config.json").read_text(encoding="utf-8"))
    config = load(cases.TINY)
    assert type(config) is ErnieMConfig
    del saved["transformers_version"], saved["dtype"]
    assert {field: getattr(config, field) for field in saved} == saved


def test_round_trip(tmp_path):
    config = ErnieMConfig(**SMALL, act_dropout=None, classifier_dropout=0.25, pruned_heads={1: [0]}, num_labels=5)
    config.save_pretrained(tmp_path)
    assert ErnieMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_json_keys_of_pruned_heads_become_numbers():
    assert ErnieMConfig(**SMALL, pruned_heads={"0": [1]}).pruned_heads == {0: [1]}
    assert ErnieMConfig(**SMALL).pruned_heads == {}


def test_other_names():
    config = ErnieMConfig(dropout=0.3, num_classes=7)
    assert (config.classifier_dropout, config.num_labels) == (0.3, 7)
    config.dropout, config.num_classes = 0.4, 3
    assert (config.classifier_dropout, config.num_labels) == (0.4, 3)


@pytest.mark.parametrize("p", [0, 0.0, 0.5, 1, 1.0])
def test_probabilities_include_both_ends(p):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "act_dropout")
    config = ErnieMConfig(**dict.fromkeys(names, p))
    assert [getattr(config, name) for name in names] == [p] * 4


NUMBERS = [
    field.name for field in dataclasses.fields(ErnieMConfig) if float in (field.type, *typing.get_args(field.type))
]


@pytest.mark.parametrize("number", [0, 1])
def test_whole_numbers_are_fine_wherever_floats_are(number, tmp_path):
    """JSON's integers too, which are saved as they came; and they mean the same."""
    assert {"initializer_range", "layer_norm_eps", "hidden_dropout_prob", "classifier_dropout"} < set(NUMBERS)
    numbers = dict.fromkeys(NUMBERS, number)
    ErnieMConfig(**SMALL, **numbers).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    loaded, changed = ErnieMConfig.from_pretrained(tmp_path), ErnieMConfig.from_pretrained(cases.TINY, **numbers)
    for values in (saved, loaded.to_dict(), changed.to_dict()):
        assert {name: values[name] for name in NUMBERS} == numbers
        assert {type(values[name]) for name in NUMBERS} == {int}
    ids = torch.tensor([[4, 5, 6]])
    models = [ErnieMModel.from_pretrained(cases.TINY, layer_norm_eps=eps).eval() for eps in (number, float(number))]
    whole, fraction = (model(ids).last_hidden_state for model in models)
    torch.testing.assert_close(whole, fraction, rtol=0, atol=1e-6)


BAD_VALUES = [
    ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size=10 .*num_attention_heads=4.* choose"),
    ({"hidden_act": "sharp"}, "hidden_act='sharp' .*use one of .*gelu"),
    ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob=1\.5 .*use a number in \[0, 1\]"),
    ({"hidden_dropout_prob": float("nan")}, r"hidden_dropout_prob=nan .*use a number in \[0, 1\]"),
    ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob=-0\.1 .*use a number in \[0, 1\]"),
    ({"classifier_dropout": 2}, r"classifier_dropout=2 .*use a number in \[0, 1\]"),
    ({"act_dropout": float("inf")}, r"act_dropout=inf .*use a number in \[0, 1\]"),
    ({"max_position_embeddings": 2}, "max_position_embeddings=2 .*use at least 3"),
    ({"pad_token_id": -1}, r"pad_token_id=-1 .*\[0, vocab_size=10\)"),
    ({"pad_token_id": 10}, r"pad_token_id=10 .*\[0, vocab_size=10\)"),
    ({"pad_token_id": 7, "max_position_embeddings": 7}, r"pad_token_id=7 .*\[0, max_position_embeddings=7\).* Use "),
    ({"initializer_range": -1}, r"initializer_range=-1 .*use a finite number from 0"),
    ({"initializer_range": float("nan")}, r"initializer_range=nan .*use a finite number from 0"),
    ({"layer_norm_eps": -1e-5}, r"layer_norm_eps=-1e-05 .*use a finite number from 0"),
    ({"layer_norm_eps": float("inf")}, r"layer_norm_eps=inf .*use a finite number from 0"),
    ({"is_decoder": True}, "is_decoder=True .*only False"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' .*only 'absolute'"),
    # Sizes of nothing: no bare ZeroDivisionError, and no model without weights.
    ({"num_attention_heads": 0}, "num_attention_heads=0 "),
    ({"num_attention_heads": -2}, "num_attention_heads=-2 "),
    ({"hidden_size": 0}, "hidden_size=0 "),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 "),
    ({"intermediate_size": 0}, "intermediate_size=0 "),
    ({"vocab_size": 0}, "vocab_size=0"),
    # Heads that are not there, or of which none is left.
    ({"pruned_heads": {2: [0]}}, "pruned_heads.* 2"),
    ({"pruned_heads": {-1: [0]}}, "pruned_heads.* -1"),
    ({"pruned_heads": {0: [2]}}, "pruned_heads.* 2"),
    ({"pruned_heads": {"1": [0, 1]}}, "pruned_heads.* 1"),
    ({"pruned_heads": {"first": [0]}}, "pruned_heads.* first"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_VALUES, ids=[str(fields) for fields, _ in BAD_VALUES])
def test_a_bad_value_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        ErnieMConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(("fields", "message"), BAD_VALUES, ids=[str(fields) for fields, _ in BAD_VALUES])
def test_a_bad_value_set_later_is_refused_by_name(fields, message):
    """When a model is built: `from_pretrained` sets what it is given one by one."""
    config = ErnieMConfig(**SMALL)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        ErnieMModel(config)


def test_a_bad_value_given_to_from_pretrained_is_refused_by_name():
    for fields, message in (
        ({"hidden_act": "sharp"}, "hidden_act='sharp'"),
        ({"pad_token_id": 514}, "pad_token_id=514"),
    ):
        with pytest.raises(ValueError, match=message):
            ErnieMModel.from_pretrained(cases.TINY, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": "8"}, {"pad_token_id": None}, {"classifier_dropout": "a"}, {"layer_norm_eps": True}],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_by_name(fields):
    """By transformers' strict dataclasses."""
    (name,) = fields
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        ErnieMConfig(**{**SMALL, **fields})


def test_the_type_of_a_value_under_its_other_name_is_checked():
    for value in ("a", [], True):
        with pytest.raises(StrictDataclassFieldValidationError, match="classifier_dropout"):
            ErnieMConfig(**SMALL, dropout=value)


def test_another_architecture_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    for load in (ErnieMConfig.from_pretrained, erniem_fast.ErnieMModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model_type='bert'.*'ernie_m'.*transformers.AutoModel"):
            load(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BertConfig
