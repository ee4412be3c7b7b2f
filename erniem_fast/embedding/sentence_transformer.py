"""What sentence-transformers' models have of their own: prompts, tokens, pooling, activations."""

import sys
from functools import partial

from torch import Tensor, nn

from .. import modes
from .batches import Tokens
from .hidden_states import Packed, hidden_states, pads
from .tokens import cut_rows

# Modules after the encoder that take the vectors of texts, wherever those come from.
_AFTER_POOLING = ("Dense", "Dropout", "LayerNorm", "Normalize")


def is_kind(model: object, kind: str) -> bool:
    """Whether an object is of one of sentence-transformers' classes of models; False where it is not installed."""
    loaded = sys.modules.get("sentence_transformers")
    return loaded is not None and isinstance(model, getattr(loaded, kind))


def check_kind(model: nn.Module, task: str, remedy: str) -> None:
    """Refuses models whose first module does not read text through a model of transformers."""
    first = model[0]
    if not hasattr(first, "modality_config") or "text" not in first.modality_config or first.backend != "torch":
        raise TypeError(
            f"model is of type {type(model).__name__} whose first module is of type {type(first).__name__}, which does "
            f"not run a model of transformers on text in PyTorch; {task} it by {remedy}."
        )


def refuse_options(model: nn.Module, **options: object) -> None:
    """Refuses options that the model has a setting of its own for."""
    for name, value in options.items():
        if value is not None:
            own = "max_seq_length" if name == "max_length" else name
            raise ValueError(
                f"{name} was given, but a model of type {type(model).__name__} keeps its own {own}; leave it out."
            )


def find_prompt(model: nn.Module, prompt: str | None, prompt_name: str | None) -> str | None:
    """The prompt that was given, or that of a name, or the model's default.

    Raises:
        ValueError: the model has no prompt of this name, or a prompt and a name were given.
    """
    if prompt is not None and prompt_name is not None:
        raise ValueError(f"Pass prompt or prompt_name; prompt={prompt!r} and prompt_name={prompt_name!r} were given.")
    if prompt is not None:
        return prompt
    name = model.default_prompt_name if prompt_name is None else prompt_name
    if name is not None and name not in model.prompts:
        raise ValueError(f"prompt_name={name!r} is not one of the model's prompts, {sorted(model.prompts)}.")
    return None if name is None else model.prompts[name]


def tokenizes(model: nn.Module, prompt: str | None, extras: dict):
    """A function from a window of texts or pairs to their tokens, as the model itself makes them.

    It puts into `extras` what the model's modules are given beside tokens, which is the same for all texts.
    """
    return partial(_tokenize, model, prompt, extras)


def _tokenize(model: nn.Module, prompt: str | None, extras: dict, items: list) -> list[Tokens]:
    features = model.preprocess(items, prompt=prompt)
    extras.update({name: features[name] for name in ("modality", "prompt_length") if name in features})
    return cut_rows(items, features)


def is_packed(model: nn.Module, bare: nn.Module) -> bool:
    """Whether the modules after the encoder can take the packed tokens of this bare model."""
    first, pooling = model[0], model[1] if len(model) > 1 else None
    text = first.modality_config["text"]
    plain = first.model is bare and (text["method"], text["method_output_name"]) == ("forward", "last_hidden_state")
    untouched = modes.is_untouched(first, type(first)) and modes.is_untouched(model, type(model))
    if (
        pads(bare)
        or not plain
        or not untouched
        or type(pooling).__name__ != "Pooling"
        or not hasattr(pooling, "_forward_flattened")
    ):
        return False
    return all(
        type(each).__name__ in _AFTER_POOLING
        and getattr(each, "module_input_name", "sentence_embedding") == "sentence_embedding"
        for each in list(model)[2:]
    )


def compute_packed(model: nn.Module, bare: nn.Module, extras: dict, packed: Packed) -> dict:
    """The features that all modules leave; the encoder is given packed tokens, and the others its results."""
    features = {
        **extras,
        "token_embeddings": hidden_states(bare, packed)[None],
        "cu_seq_lens_q": packed.cu_seqlens,
    }
    for module in list(model)[1:]:
        features = module(features)
    return features


def compute_padded(model: nn.Module, extras: dict, packed: Packed) -> dict[str, Tensor]:
    """The features that all modules leave, by the model's own forward."""
    return model({**extras, **packed.padded(model.tokenizer.pad_token_id or 0)})
