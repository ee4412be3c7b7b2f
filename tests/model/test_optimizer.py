"""The rates and decays of parameters."""

import pytest
import torch
from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

from erniem_fast import (
    ErnieMConfig,
    ErnieMForMaskedLM,
    ErnieMForSequenceClassification,
    ErnieMModel,
    create_optimizer,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
CONFIG = ErnieMConfig(**SIZES)


def settings_of(model, optimizer):
    """Each parameter's rate and decay, by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    found = [(names[each], (group["lr"], group["weight_decay"])) for group in groups for each in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("prefix", ["", "ernie_m."])
def test_rates(prefix):
    """Those of ERNIE-M's paper, and no decay where there is one dimension."""
    model = ErnieMForSequenceClassification(CONFIG) if prefix else ErnieMModel(CONFIG)
    found = settings_of(model, create_optimizer(model, 1e-3, layer_decay=0.5, weight_decay=0.1))
    assert found.keys() == dict(model.named_parameters()).keys()
    expected = {
        "embeddings.word_embeddings.weight": (1e-3 / 16, 0.1),
        "embeddings.position_embeddings.weight": (1e-3 / 16, 0.1),
        "embeddings.layer_norm.weight": (1e-3 / 16, 0.0),
        "encoder.layers.0.linear1.weight": (1e-3 / 8, 0.1),
        "encoder.layers.1.self_attn.self_attn.q_proj.bias": (1e-3 / 4, 0.0),
        "encoder.layers.2.norm2.weight": (1e-3 / 2, 0.0),
        "pooler.dense.weight": (1e-3, 0.1),
    }
    assert {name: found[prefix + name] for name in expected} == expected
    assert not prefix or (found["classifier.weight"], found["classifier.bias"]) == ((1e-3, 0.1), (1e-3, 0.0))


def test_a_shared_table_is_an_embedding():
    model = ErnieMForMaskedLM(CONFIG)
    found = settings_of(model, create_optimizer(model, 1e-3, layer_decay=0.5))
    assert found["ernie_m.embeddings.word_embeddings.weight"] == (1e-3 / 16, 0.0)
    assert found["lm_head.bias"] == found["lm_head.dense.weight"] == (1e-3, 0.0)
    assert "ernie_m.pooler.dense.weight" not in found


def test_models_of_transformers():
    model = XLMRobertaForTokenClassification(XLMRobertaConfig(**SIZES))
    found = settings_of(model, create_optimizer(model, 1e-3, layer_decay=0.5))
    assert found["roberta.embeddings.word_embeddings.weight"][0] == 1e-3 / 16
    assert found["roberta.encoder.layer.0.intermediate.dense.weight"][0] == 1e-3 / 8
    assert found["classifier.weight"][0] == 1e-3


def test_frozen_parameters_are_left_out():
    model = ErnieMModel(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    optimizer = create_optimizer(model, 1e-3, layer_decay=0.5)
    assert set(settings_of(model, optimizer).values()) == {(1e-3 / 2, 0.0)}
    assert {group["name"] for group in optimizer.param_groups} == {"layer 2"}
    with pytest.raises(ValueError, match="No parameter of the model requires gradients"):
        create_optimizer(model.requires_grad_(False))
    with pytest.raises(ValueError, match="layer_decay=0 must be above 0"):
        create_optimizer(torch.nn.Linear(2, 2), layer_decay=0)
