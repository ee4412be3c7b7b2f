"""`embed`: texts to vectors."""

from collections.abc import Collection, Iterable, Iterator, Sized
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as to_unit_length
from transformers import PreTrainedTokenizerBase

from . import sentence_transformer
from .batches import TOKENS_PER_BATCH, Steps, Tokens, run
from .hidden_states import Packed, pads, token_states
from .models import bare_model, encoders
from .pooling import POOLINGS, pool
from .results import collect
from .tokens import check_texts, find_limit, find_tokenizer, tokenizes


@overload
def embed(
    model: object,
    texts: Collection[str],
    tokenizer: PreTrainedTokenizerBase | None = ...,
    *,
    pooling: str | None = ...,
    normalize: bool | None = ...,
    prompt: str | None = ...,
    prompt_name: str | None = ...,
    max_length: int | None = ...,
    tokens_per_batch: int = ...,
    convert_to_tensor: Literal[False] = ...,
    show_progress_bar: bool | None = ...,
) -> np.ndarray: ...


@overload
def embed(
    model: object, texts: Collection[str], *arguments: Any, convert_to_tensor: Literal[True], **options: Any
) -> Tensor: ...


@overload
def embed(model: object, texts: Iterator[str], *arguments: Any, **options: Any) -> Iterator[Any]: ...


def embed(
    model: object,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    convert_to_tensor: bool = False,
    show_progress_bar: bool | None = None,
) -> np.ndarray | Tensor | Iterator[np.ndarray] | Iterator[Tensor]:
    """Turns texts into vectors, one for each, in their order.

    Texts are tokenised once and batched by their tokens. Models of this package, and those that `optimize` has taken,
    compute and pool these alone, packed; others are given rows with padding. The model is set to eval, as
    sentence-transformers does.

    Args:
        model: an ERNIE-M model of this package, or a model of transformers with `last_hidden_state`, bare or with a
            head, which is left out; or a `SentenceTransformer`, which keeps its prompts, truncation, pooling and
            normalisation; or an object with such a model in the attribute `model`, as a pipeline has.
        texts: strings, in a list or anything else with a length; or in an iterator of any length.
        tokenizer: the model's; by default the object's own, or that of the checkpoint which the model was loaded from.
        pooling: `mean` (the default), `cls` (the first token), `max` or `last`, over a text's tokens and its special
            tokens. Not for a `SentenceTransformer`, which has its own.
        normalize: whether vectors get length 1. By default they do, except those of a `SentenceTransformer`, unless one
            of its modules does it.
        prompt: put before each text.
        prompt_name: of one of a `SentenceTransformer`'s prompts.
        max_length: the number of tokens at which texts are cut off, special tokens included; at most and by default
            what the model has positions for. Not for a `SentenceTransformer`, which has `max_seq_length`. Texts that
            fill it are counted, and a line of the log says how many there were.
        tokens_per_batch: the tokens of a batch. A text that is longer makes a batch of its own.
        convert_to_tensor: whether to return a tensor, on the CPU.
        show_progress_bar: by default, there is one if the standard error is a terminal.

    Returns:
        float32 `(texts, dimension)`, of NumPy or torch. If `texts` has no length, an iterator over such arrays for
        consecutive texts, which reads texts as it goes and holds at most a thousand of them.

    Raises:
        TypeError: `texts`, a text, the tokenizer or the prompt is of another type, or there is no such model in the
            object.
        ValueError: an argument has another value than it may have, or is not for this model; the model has no
            tokenizer; or a text has no tokens, or half of a surrogate pair.
    """
    checked = check_texts(texts)
    if sentence_transformer.is_kind(model, "SentenceTransformer"):
        sentence_transformer.refuse_options(model, pooling=pooling, tokenizer=tokenizer, max_length=max_length)
        prompt = sentence_transformer.find_prompt(model, prompt, prompt_name)
        steps, dimension = _steps_of_sentence_transformer(model, prompt, bool(normalize))
    else:
        if prompt_name is not None:
            raise ValueError(f"prompt_name={prompt_name!r} is for a SentenceTransformer; pass prompt=.")
        steps, dimension = _steps(model, tokenizer, pooling or "mean", normalize is not False, prompt or "", max_length)
    total = len(texts) if isinstance(texts, Sized) else None
    windows = run(checked, steps, tokens_per_batch, show_progress_bar, total)
    return collect(windows, total, (dimension,), convert_to_tensor)


def _steps(
    model: object,
    tokenizer: PreTrainedTokenizerBase | None,
    pooling: str,
    normalize: bool,
    prompt: str,
    max_length: int | None,
) -> tuple[Steps, int]:
    """The steps of a model without a pooling of its own, and the dimension of its vectors."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is unknown; use {', '.join(map(repr, POOLINGS))}.")
    bare = bare_model(model).eval()
    tokenizer = find_tokenizer(model, tokenizer)
    limit, padded = find_limit(bare, tokenizer, max_length), pads(bare)

    @torch.inference_mode()
    def compute(batch: list[Tokens]) -> Tensor:
        packed = Packed.of(batch, bare.device)
        hidden = token_states(bare, packed, padded, tokenizer.pad_token_id)
        vectors = pool(hidden, packed.cu_seqlens, pooling)
        return (to_unit_length(vectors, dim=-1) if normalize else vectors).cpu()

    return Steps(tokenizes(tokenizer, limit, prompt), compute, padded, limit), bare.config.hidden_size


def _steps_of_sentence_transformer(model: nn.Module, prompt: str | None, normalize: bool) -> tuple[Steps, int]:
    sentence_transformer.check_kind(model, "embed", "model.encode")
    bare = model.eval()[0].model
    is_packed = encoders(model) == [bare] and sentence_transformer.is_packed(model, bare)
    extras = {}

    @torch.inference_mode()
    def compute(batch: list[Tokens]) -> Tensor:
        packed = Packed.of(batch, model.device)
        if is_packed:
            features = sentence_transformer.compute_packed(model, bare, extras, packed)
        else:
            features = sentence_transformer.compute_padded(model, extras, packed)
        vectors = features["sentence_embedding"].float()[:, : model.truncate_dim]
        return (to_unit_length(vectors, dim=-1) if normalize else vectors).cpu()

    steps = Steps(
        sentence_transformer.tokenizes(model, prompt, extras), compute, not is_packed, model.get_max_seq_length()
    )
    return steps, model.get_embedding_dimension()
