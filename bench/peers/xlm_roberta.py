"""ERNIE-M as XLM-RoBERTa: the same architecture, but for a row of token types, which is zero here.

Every rival that runs XLM-RoBERTa so runs ERNIE-M, and is compared on the same weights.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file
from transformers import XLMRobertaConfig, XLMRobertaModel

# Parts of a parameter's name: ERNIE-M's and XLM-RoBERTa's.
NAMES = {
    "embeddings.layer_norm": "embeddings.LayerNorm",
    "encoder.layers": "encoder.layer",
    "self_attn.self_attn.q_proj": "attention.self.query",
    "self_attn.self_attn.k_proj": "attention.self.key",
    "self_attn.self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
PAD = 1
HEADS_PREFIX = "ernie_m."  # of the encoder's parameters in a checkpoint that has a head


def load(folder, dtype, attention):
    """The XLMRobertaModel that computes what the ERNIE-M checkpoint in `folder` does, for rows padded on the right.

    Args:
        folder: holds config.json, and model.safetensors or pytorch_model.bin.
        dtype: of the weights.
        attention: "eager" or "sdpa".
    """
    fields = json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in fields.items() if name in XLMRobertaConfig.__dataclass_fields__}
    config = XLMRobertaConfig(**{**kept, "model_type": "xlm-roberta", "type_vocab_size": 1})
    state = remap(_read(pathlib.Path(folder)))
    model = XLMRobertaModel.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=attention
    )
    model.embeddings.token_type_embeddings.requires_grad_(False)  # ERNIE-M has none to train
    return model


def remap(state):
    """The state dict of an ErnieMModel, as that of an XLMRobertaModel."""
    remapped = {}
    for name, tensor in state.items():
        for theirs, new in NAMES.items():
            name = name.replace(theirs, new)
        remapped[name] = tensor
    words = state["embeddings.word_embeddings.weight"]
    return {**remapped, TOKEN_TYPES: words.new_zeros(1, words.shape[1])}


def _read(folder):
    path = folder / "model.safetensors"
    state = load_file(path) if path.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    if any(name.startswith(HEADS_PREFIX) for name in state):
        return {k.removeprefix(HEADS_PREFIX): v for k, v in state.items() if k.startswith(HEADS_PREFIX)}
    return state
