"""What the situations share: inputs, XLM-RoBERTa with the same weights, and how results are compared."""

import copy

import torch
from torch import nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from bench.peers import xlm_roberta
from erniem_fast import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
)
from tests.model.tiny import RIGHT, assert_close, gradients, load, logits_of, make_ids

IDS, MASK, REAL = make_ids(RIGHT), RIGHT, RIGHT.bool()
ROWS, COLUMNS = MASK.shape
FULL = IDS.clamp(min=4)  # without padding
BATCH = {"input_ids": IDS, "attention_mask": MASK}

# A batch, and one row so short that a layer is one native call.
INPUTS = [BATCH, {"input_ids": IDS[1:2, :7]}]
TEXTS = ["Your password was changed.", "Ihr Passwort wurde geändert.", "Log in again", "重新登录 now", "x"]
RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "act_dropout": 0.3}


def peer_of(model):
    """The XLMRobertaModel with an ErnieMModel's weights, which computes the same for rows padded on the right."""
    fields = model.config.to_dict().items()
    kept = {name: value for name, value in fields if name in XLMRobertaConfig.__dataclass_fields__}
    peer = XLMRobertaModel(XLMRobertaConfig(**{**kept, "model_type": "xlm-roberta", "type_vocab_size": 1}))
    peer.load_state_dict(xlm_roberta.remap(model.state_dict()))
    return peer.eval()


def small_config(hidden, heads, intermediate):
    return ErnieMConfig(
        vocab_size=50,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        max_position_embeddings=40,
        initializer_range=hidden**-0.5,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )


def assert_same_as_peer(model):
    """States at real tokens, of a batch and of one short row."""
    peer = peer_of(model)
    for inputs in INPUTS:
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with torch.no_grad():
            assert_close(model(**inputs).last_hidden_state[real], peer(**inputs).last_hidden_state[real])


def cubes(model, inputs=BATCH):
    """The sum of the cubed states of real tokens."""
    hidden = model(**inputs).last_hidden_state
    return (hidden[REAL] if inputs is BATCH else hidden).pow(3).sum()


def gradients_of(model=None):
    """The gradients of `cubes`, by default of a model that has just been loaded."""
    model = load().train() if model is None else model
    cubes(model).backward()
    return gradients(model)


def assert_same_results(model, expected):
    """Of a batch and of one short row, with autograd and without."""
    for inputs in INPUTS:
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                values, others = logits_of(model(**inputs)), logits_of(expected(**inputs))
            for name, value in others.items():
                assert_close(values[name], value)


def with_weights(model, change):
    """A copy of a model whose parameters are what `change` makes of each of its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(change(parameter.detach())))
    return model


def batch_for(model):
    """`BATCH`, whose rows are the choices of one where a model takes choices."""
    choices = isinstance(model, ErnieMForMultipleChoice)
    return {name: each[None] if choices else each for name, each in BATCH.items()}


SEVERAL = torch.eye(3)[[0, 2, 1, 1]]
HEADS_AND_LABELS = {
    "classes": (ErnieMForSequenceClassification, {"num_labels": 3}, {"labels": torch.tensor([0, 2, 1, 1])}),
    "several classes": (ErnieMForSequenceClassification, {"num_labels": 3}, {"labels": SEVERAL}),
    "number": (ErnieMForSequenceClassification, {"num_labels": 1}, {"labels": torch.tensor([3.0, 0.0, 1.0, 5.0])}),
    "tokens": (ErnieMForTokenClassification, {"num_labels": 3}, {"labels": IDS % 3}),
    "columns": (ErnieMForQuestionAnswering, {}, {"start_positions": 1 - MASK[:, 1], "end_positions": MASK[:, 3]}),
    "spans": (ErnieMForInformationExtraction, {}, {"start_positions": IDS % 2, "end_positions": (IDS + 1) % 2}),
    "choice": (ErnieMForMultipleChoice, {}, {"labels": torch.tensor([2])}),
}
