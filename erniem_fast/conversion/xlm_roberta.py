"""XLM-RoBERTa as ERNIE-M, and back: the same function, since both are the same layers under other names.

XLM-RoBERTa adds a row for the token type, always the same, to every token's position. ERNIE-M has no types, so that
this row goes into its table of positions. Its rows are counted alike if padding has the id 1: a row's first token reads
row 2. XLM-RoBERTa counts real tokens and ERNIE-M columns, so rows are equal if they are padded on the right.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, XLMRobertaConfig

if TYPE_CHECKING:
    from ..modeling import ErnieMPreTrainedModel

_ROWS = 2  # reserved in ERNIE-M's table of positions

# XLM-RoBERTa's modules and ours, by class: what is not in the encoder, under full names.
_SAME = {"classifier": "classifier"}
_WORDS = {name: name for name in ("lm_head", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")}
_HEADS: dict[str, tuple[str, dict[str, str]]] = {
    "XLMRobertaModel": ("ErnieMModel", {}),
    "XLMRobertaForMaskedLM": ("ErnieMForMaskedLM", _WORDS),
    "XLMRobertaForMultipleChoice": ("ErnieMForMultipleChoice", _SAME),
    "XLMRobertaForTokenClassification": ("ErnieMForTokenClassification", _SAME),
    "XLMRobertaForQuestionAnswering": ("ErnieMForQuestionAnswering", {"qa_outputs": "qa_outputs"}),
    # A dense layer and tanh on the first token: what ERNIE-M has as its pooler.
    "XLMRobertaForSequenceClassification": (
        "ErnieMForSequenceClassification",
        {"classifier.dense": "ernie_m.pooler.dense", "classifier.out_proj": "classifier"},
    ),
}
_EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.LayerNorm": "embeddings.layer_norm",
}
_POSITIONS, _TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
_LAYER = {
    "attention.self.query": "self_attn.self_attn.q_proj",
    "attention.self.key": "self_attn.self_attn.k_proj",
    "attention.self.value": "self_attn.self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
# Fields of the configs that mean the same in both.
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "classifier_dropout",
    "id2label",
    "label2id",
    "problem_type",
    "tie_word_embeddings",
)


def from_xlm_roberta(model: PreTrainedModel) -> "ErnieMPreTrainedModel":
    """An ERNIE-M model that computes what an XLM-RoBERTa model of transformers does, for the same ids.

    Args:
        model: an encoder, or one with a head for words, sequences, tokens, choices or answers, with plain weights;
            also one that `optimize` has taken.

    Returns:
        A new model, with its own weights, in the dtype, on the device and in the mode of `model`. A dropout in front of
        the dense layer of XLM-RoBERTa's head for sequences has no place in it. XLM-RoBERTa's model with a head for
        words has no pooler, so that ours gets a new one, which it does not run.

    Raises:
        ValueError: ERNIE-M does not have something that the model has; the message names it.
    """
    name, heads = _HEADS.get(type(model).__name__, (None, {}))
    if name is None:
        raise ValueError(
            f"{type(model).__name__} has a head that ERNIE-M does not have, or is no XLM-RoBERTa; "
            f"{', '.join(_HEADS)} can be converted. Convert the encoder alone, which is "
            f"model.{model.base_model_prefix}."
        )
    config, tensors = model.config, dict(model.state_dict())
    _check_xlm_roberta(config)
    theirs, ours = _prefixes(name)
    first = config.pad_token_id + 1  # the row of a row's first token
    positions = tensors.pop(theirs + _POSITIONS)
    types = tensors.pop(theirs + _TYPES)
    table = _moved(positions, first, _ROWS)
    table[_ROWS:] += types[0]
    state = dict(_renamed(tensors, _modules(config.num_hidden_layers, theirs, ours, heads), "ERNIE-M"))
    if "lm_head.decoder.bias" in state:
        # Where the word table is not shared, theirs has another one, which computes nothing.
        state["lm_head.bias"] = state["lm_head.decoder.bias"].clone()
    fields = {field: getattr(config, field) for field in _FIELDS} | {"max_position_embeddings": len(table)}
    made = import_module("erniem_fast.configuration").ErnieMConfig(**fields)
    return _made("erniem_fast.modeling", name, made, {**state, ours + _POSITIONS: table}, model)


def to_xlm_roberta(model: "ErnieMPreTrainedModel") -> PreTrainedModel:
    """An XLM-RoBERTa model of transformers that computes what an ERNIE-M model does, for the same ids.

    Args:
        model: an encoder, or one with a head for words, sequences, tokens, choices or answers, with plain weights.

    Returns:
        A new model, with its own weights, in the dtype, on the device and in the mode of `model`. The row for its token
        type is zero. With a head for words it has no pooler.

    Raises:
        ValueError: XLM-RoBERTa does not have something that the model has; the message names it.
    """
    found = [(name, heads) for name, (ours, heads) in _HEADS.items() if ours == type(model).__name__]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has a head that XLM-RoBERTa does not have, or is no ERNIE-M; "
            f"{', '.join(ours for ours, _ in _HEADS.values())} can be converted. Convert the encoder alone, which is "
            f"model.{model.base_model_prefix}."
        )
    name, heads = found[0]
    config, tensors = model.config, dict(model.state_dict())
    _check_ernie_m(config)
    theirs, ours = _prefixes(type(model).__name__)
    table = _moved(tensors.pop(ours + _POSITIONS), _ROWS, config.pad_token_id + 1)
    modules = _modules(config.num_hidden_layers, theirs, ours, heads)
    state = dict(_renamed(tensors, {ours: theirs for theirs, ours in modules.items()}, "XLM-RoBERTa"))
    if name == "XLMRobertaForMaskedLM":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("roberta.pooler.")}
    state |= {theirs + _POSITIONS: table, theirs + _TYPES: table.new_zeros(1, config.hidden_size)}
    fields = {field: getattr(config, field) for field in _FIELDS} | {"max_position_embeddings": len(table)}
    made = XLMRobertaConfig(**fields, type_vocab_size=1, bos_token_id=0, eos_token_id=2)
    return _made("transformers", name, made, state, model)


def _prefixes(name: str) -> tuple[str, str]:
    """What stands before the encoder's names, in XLM-RoBERTa and here, for a class of ours."""
    return ("", "") if name == "ErnieMModel" else ("roberta.", "ernie_m.")


def _modules(layers: int, theirs: str, ours: str, heads: dict[str, str]) -> dict[str, str]:
    """Names of all modules with weights, XLM-RoBERTa's to ours, but for positions and types."""
    encoder = {theirs + key: ours + value for key, value in {**_EMBEDDINGS, "pooler.dense": "pooler.dense"}.items()}
    for layer in range(layers):
        before = f"{theirs}encoder.layer.{layer}.", f"{ours}encoder.layers.{layer}."
        encoder |= {before[0] + key: before[1] + value for key, value in _LAYER.items()}
    return encoder | heads


def _renamed(tensors: dict[str, Tensor], modules: dict[str, str], target: str) -> Iterator[tuple[str, Tensor]]:
    """Copies of a state dict's tensors under the target's names."""
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module not in modules or kind not in ("weight", "bias"):
            raise ValueError(
                f"The model has a tensor {name!r}, which {target} does not have; merge adapters into the weights, and "
                f"call erniem_fast.restore(model) if its weights are packed or rounded."
            )
        yield f"{modules[module]}.{kind}", tensor.clone()


def _moved(table: Tensor, first: int, target: int) -> Tensor:
    """A copy of a table of positions whose row `first` becomes row `target`. No token reads the rows before it."""
    reserved = table[:target] if first == target else table.new_zeros(target, table.shape[1])
    return torch.cat([reserved, table[first:]])


def _made(module: str, name: str, config: Any, state: dict[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    """A new model. Its class is looked up by name, since the modules of our classes import this package."""
    options = {} if "pooler.dense.weight" in state or not name.endswith("Model") else {"add_pooling_layer": False}
    model_class = getattr(import_module(module), name)
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=like.dtype, **options)
    return model.to(like.device).train(like.training)


def _check_xlm_roberta(config: Any) -> None:
    _check(
        (
            ("position_embedding_type", getattr(config, "position_embedding_type", None), ("absolute", None)),
            ("is_decoder", config.is_decoder, (False,)),
            ("add_cross_attention", getattr(config, "add_cross_attention", False), (False,)),
            ("type_vocab_size", config.type_vocab_size, (1,)),
        ),
        "ERNIE-M",
    )


def _check_ernie_m(config: Any) -> None:
    fields = (("act_dropout", config.act_dropout, (0.0,)), ("pruned_heads", config.pruned_heads, ({},)))
    padded = ("uie_padded_length", getattr(config, "uie_padded_length", None), (None,))
    _check((*fields, padded), "XLM-RoBERTa")


def _check(fields: Iterable[tuple[str, Any, tuple]], target: str) -> None:
    for name, value, same in fields:
        if value not in same:
            raise ValueError(
                f"{target} has nothing like {name}={value!r}, which this model has; only {same[0]!r} maps."
            )
