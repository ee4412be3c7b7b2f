"""`score`: pairs of texts to the scores of a reranker, or to logits of a classifier."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from importlib import import_module
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import families, modes
from ..modeling import ErnieMForSequenceClassification
from . import sentence_transformer
from .batches import TOKENS_PER_BATCH, Steps, Tokens, run
from .hidden_states import Packed, hidden_states, pads
from .models import bare_model
from .results import collect
from .tokens import check_pairs, find_limit, find_tokenizer, tokenizes


@overload
def score(
    model: object,
    pairs: Collection[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase | None = ...,
    *,
    activation_fn: Callable[[Tensor], Tensor] | None = ...,
    prompt: str | None = ...,
    prompt_name: str | None = ...,
    max_length: int | None = ...,
    tokens_per_batch: int = ...,
    convert_to_tensor: Literal[False] = ...,
    show_progress_bar: bool | None = ...,
) -> np.ndarray: ...


@overload
def score(
    model: object, pairs: Collection[tuple[str, str]], *arguments: Any, convert_to_tensor: Literal[True], **options: Any
) -> Tensor: ...


@overload
def score(model: object, pairs: Iterator[tuple[str, str]], *arguments: Any, **options: Any) -> Iterator[Any]: ...


def score(
    model: object,
    pairs: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    activation_fn: Callable[[Tensor], Tensor] | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    convert_to_tensor: bool = False,
    show_progress_bar: bool | None = None,
) -> np.ndarray | Tensor | Iterator[np.ndarray] | Iterator[Tensor]:
    """Scores pairs of texts, in their order, as `CrossEncoder.predict` does.

    Pairs are batched as `erniem_fast.embed` batches texts, which describes the arguments that are not below.

    Args:
        model: a `CrossEncoder`; or a model for sequence classification, ERNIE-M's or one of transformers.
        pairs: of strings, such as (query, document), in a list or in an iterator of any length.
        activation_fn: applied to the logits, `(pairs, labels)` in float32. By default that of the `CrossEncoder`; for
            other models what a `CrossEncoder` of them would have: what the config says, or else the sigmoid of a
            single label, and several labels as they are.

    Returns:
        float32 `(pairs,)` from a model with one label, otherwise `(pairs, labels)`. If `pairs` has no length, an
        iterator over such arrays for consecutive pairs.

    Raises:
        TypeError: a pair does not hold two strings, or the model is no classifier of sequences.
        ValueError: as by `erniem_fast.embed`.
    """
    checked = check_pairs(pairs)
    if sentence_transformer.is_kind(model, "CrossEncoder"):
        sentence_transformer.refuse_options(model, tokenizer=tokenizer, max_length=max_length)
        prompt = sentence_transformer.find_prompt(model, prompt, prompt_name)
        steps, labels = _steps_of_cross_encoder(model, prompt, activation_fn)
    else:
        if prompt_name is not None:
            raise ValueError(f"prompt_name={prompt_name!r} is for a CrossEncoder; pass prompt=.")
        steps, labels = _steps(model, tokenizer, activation_fn, prompt or "", max_length)
    total = len(pairs) if isinstance(pairs, Sized) else None
    shape = () if labels == 1 else (labels,)
    return collect(run(checked, steps, tokens_per_batch, show_progress_bar, total), total, shape, convert_to_tensor)


def _steps(
    model: object,
    tokenizer: PreTrainedTokenizerBase | None,
    activation: Callable[[Tensor], Tensor] | None,
    prompt: str,
    max_length: int | None,
) -> tuple[Steps, int]:
    """The steps of a classifier, and the number of its labels."""
    held = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if held is None or not type(held).__name__.endswith("ForSequenceClassification"):
        raise TypeError(
            f"model is of type {type(model).__name__}; pass a CrossEncoder or a model for sequence classification, as "
            f"AutoModelForSequenceClassification loads it."
        )
    bare = bare_model(held.eval())
    tokenizer, activation = find_tokenizer(model, tokenizer), activation or _default_activation(held)
    limit, padded, pad_id = (
        find_limit(bare, tokenizer, max_length),
        not _is_packed(held),
        tokenizer.pad_token_id,
    )

    @torch.inference_mode()
    def compute(batch: list[Tokens]) -> Tensor:
        packed = Packed.of(batch, held.device)
        logits = held(**packed.padded(pad_id or 0)).logits if padded else _logits(held, packed)
        return _finish(logits, activation, held.num_labels)

    return Steps(tokenizes(tokenizer, limit, prompt), compute, padded, limit), held.num_labels


def _steps_of_cross_encoder(
    model: nn.Module, prompt: str | None, activation: Callable[[Tensor], Tensor] | None
) -> tuple[Steps, int]:
    sentence_transformer.check_kind(model, "score", "model.predict")
    held, activation = model.eval()[0].model, activation or model.activation_fn
    is_packed = len(model) == 1 and model[0].transformer_task == "sequence-classification" and _is_packed(held)
    extras = {}

    @torch.inference_mode()
    def compute(batch: list[Tokens]) -> Tensor:
        packed = Packed.of(batch, model.device)
        if is_packed:
            scores = _logits(held, packed)
        else:
            scores = sentence_transformer.compute_padded(model, extras, packed)["scores"]
        return _finish(scores, activation, model.num_labels)

    limit = model.get_max_seq_length()
    return Steps(sentence_transformer.tokenizes(model, prompt, extras), compute, not is_packed, limit), model.num_labels


def _is_packed(model: PreTrainedModel) -> bool:
    """Whether `_logits` takes this classifier: transformers' own of a family that is taken, or ERNIE-M's."""
    if isinstance(model, ErnieMForSequenceClassification):
        return True
    if not modes.is_untouched(model, type(model)):
        return False
    return families.is_of_family(model) and not pads(model.base_model)


def _logits(model: PreTrainedModel, packed: Packed) -> Tensor:
    """`(texts, labels)`, of a classifier that does not pad; its head is given rows of one token each, the first."""
    if isinstance(model, ErnieMForSequenceClassification):
        bounds = {"cu_seq_lens_q": packed.cu_seqlens, "max_length_q": max(packed.lengths)}
        return model(input_ids=packed.ids[None], **bounds).logits
    first = hidden_states(model.base_model, packed)[packed.cu_seqlens[:-1].long()][:, None]
    if model.base_model.pooler is not None:  # BERT's head is on the pooler
        return model.classifier(model.dropout(model.base_model.pooler(first)))
    return model.classifier(first)


def _finish(logits: Tensor, activation: Callable[[Tensor], Tensor], labels: int) -> Tensor:
    scores = activation(logits.float())
    return (scores.squeeze(-1) if labels == 1 and scores.dim() > 1 else scores).float().cpu()


def _default_activation(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What a `CrossEncoder` of this model would apply; a path in the config counts only if it leads into torch."""
    config = model.config
    path = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    path = path or getattr(config, "sbert_ce_default_activation_function", None)
    if path is not None and path.startswith("torch."):
        module, name = path.rsplit(".", 1)
        return getattr(import_module(module), name)()
    return nn.Sigmoid() if model.num_labels == 1 else nn.Identity()
