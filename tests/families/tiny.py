"""Tiny models of every family, and inputs of every layout of padding."""

import copy

import torch
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import erniem_fast
from tests.model.tiny import MASK, REAL

# Beside float64, transformers' gradients and ours were both off by up to 7e-6 of the largest, on a CPU without vectors.
GRADIENTS = 2e-5

VOCABULARY, HIDDEN, COLUMNS = 100, 32, MASK.shape[1]
PAD = 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}

FAMILIES = {
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, 1),
    "roberta": (RobertaModel, RobertaConfig, 1),
    "camembert": (CamembertModel, CamembertConfig, 1),
    "bert": (BertModel, BertConfig, 2),
}

# Of every sequence at least one token is real: transformers has no numbers for the others.
ROWS = slice(0, 5)
ATTENTION_MASK, REAL_TOKENS = MASK[ROWS], REAL[ROWS]
IDS = torch.randint(4, VOCABULARY, ATTENTION_MASK.shape, generator=torch.Generator().manual_seed(0))
IDS = IDS.masked_fill(~REAL_TOKENS, PAD)
TYPES = torch.randint(0, 2, IDS.shape, generator=torch.Generator().manual_seed(1))
EMBEDS = torch.randn(*IDS.shape, HIDDEN, generator=torch.Generator().manual_seed(2))


def make(family="xlm-roberta", model_class=None, dropout=0.0, **options):
    """A model of a family in eval, with weights that are the same every time, biases and norms too."""
    bare, config_class, types = FAMILIES[family]
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    config = config_class(**{**SIZES, "type_vocab_size": types, "layer_norm_eps": 1e-5, **rates, **options})
    torch.manual_seed(5)
    model = (model_class or bare)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(name.endswith("Norm.weight")), std=0.3)
    return model


def both(family="xlm-roberta", **options):
    """A stock model, and a copy that is optimised."""
    stock = make(family, **options)
    return stock, erniem_fast.optimize(copy.deepcopy(stock))
