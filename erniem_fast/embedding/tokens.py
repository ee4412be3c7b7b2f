"""From texts, or pairs of texts, to tokens, by the tokenizer that belongs to a model."""

from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..inputs import as_integer
from .batches import Tokens

NOT_UNICODE = "half of a surrogate pair, which is no character; remove that"


def check_texts(texts: Iterable[str], name: str = "texts") -> Iterator[str]:
    """The texts, each known to be a string.

    Raises:
        TypeError: a text is not a string, or there are no texts to iterate over.
        ValueError: a text is no Unicode.
    """
    # What has two dimensions, as a table of pandas, may iterate over names of columns.
    if isinstance(texts, str | bytes | dict) or not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise TypeError(f"{name} is of type {type(texts).__name__}; pass a list or an iterator of strings.")
    return _check_each(texts, name)


def _check_each(texts: Iterable[str], name: str) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"{name}[{index}] is {text!r:.60}, of type {type(text).__name__}; texts must be strings. Leave out "
                f"rows without text, or pass an empty string for them."
            )
        if not is_unicode(text):
            raise ValueError(f"{name}[{index}], {text!r:.60}, has {NOT_UNICODE}.")
        yield text


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: tokenizers and files do not take halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The pairs, each known to hold two strings.

    Raises:
        TypeError: a pair does not, or there are no pairs to iterate over.
        ValueError: a text is no Unicode.
    """
    if isinstance(pairs, str | bytes | dict) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is of type {type(pairs).__name__}; pass a list or an iterator of pairs of strings.")
    return _check_each_pair(pairs)


def _check_each_pair(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for index, pair in enumerate(pairs):
        unordered = isinstance(pair, str | bytes | Mapping | Set) or not isinstance(pair, Iterable)
        both = () if unordered else tuple(pair)
        if len(both) != 2 or not all(isinstance(each, str) for each in both):
            raise TypeError(
                f"pairs[{index}] is {pair!r:.60}; a pair must hold two strings, as (query, document) does. For a "
                f"single pair, pass [pair]."
            )
        if not all(map(is_unicode, both)):
            raise ValueError(f"pairs[{index}], {pair!r:.60}, has {NOT_UNICODE}.")
        yield both


def find_tokenizer(model: object, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, or that of the object, or that of the checkpoint which it was loaded from.

    Raises:
        TypeError: what was given is no tokenizer.
        ValueError: there is none.
    """
    if tokenizer is not None:
        if not callable(tokenizer):
            raise TypeError(
                f"tokenizer is of type {type(tokenizer).__name__}; pass a tokenizer of transformers, as "
                f"AutoTokenizer.from_pretrained loads it."
            )
        return tokenizer
    held = getattr(model, "tokenizer", None)
    if held is not None:
        return held
    path = getattr(model, "name_or_path", "")
    if not path:
        raise ValueError("tokenizer is None, but the model was not loaded from a checkpoint; pass its tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no tokenizer in {path!r}: {error} Pass tokenizer=.") from error


def find_limit(bare: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """The number of tokens at which texts are cut off.

    Raises:
        ValueError: `max_length` is more than the model has positions for, or less than a text needs.
    """
    rows = getattr(bare.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # Rows up to that of padding are no position of a token, in models that number padding.
    padding = getattr(getattr(bare, "embeddings", None), "padding_idx", None)
    positions = rows if padding is None else rows - padding - 1
    if max_length is None:
        return min(positions, tokenizer.model_max_length)
    least = tokenizer.num_special_tokens_to_add() + 1
    return as_integer("max_length", max_length, least, positions, ", which the model can read")


def tokenizes(tokenizer: PreTrainedTokenizerBase, limit: int, prompt: str = ""):
    """A function from a window of texts or pairs to their tokens, `limit` at most."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is {prompt!r:.60}, of type {type(prompt).__name__}; pass a string.")
    return partial(_tokenize, tokenizer, limit, prompt)


def _tokenize(tokenizer: PreTrainedTokenizerBase, limit: int, prompt: str, items: list) -> list[Tokens]:
    if prompt:
        items = [prompt + each if isinstance(each, str) else (prompt + each[0], each[1]) for each in items]
    encoded = tokenizer(items, truncation="longest_first", max_length=limit, return_attention_mask=False)
    types = encoded.get("token_type_ids", [None] * len(items))
    return [_tokens(*each) for each in zip(items, encoded["input_ids"], types, strict=True)]


def _tokens(item: object, ids: list[int] | Tensor, types: list[int] | Tensor | None) -> Tokens:
    if len(ids) == 0:
        raise ValueError(
            f"{item!r:.60} has no tokens, because the tokenizer adds no special tokens; leave such texts out."
        )
    return Tokens(torch.as_tensor(ids), None if types is None else torch.as_tensor(types))


def cut_rows(items: list, features: dict[str, Tensor]) -> list[Tokens]:
    """The tokens in the tensors of a tokenizer, which are rows with a mask, or one row with bounds.

    Args:
        items: the texts or pairs.
        features: `input_ids` and where there are some `token_type_ids`, with `attention_mask`, each `(items, columns)`;
            or with `cu_seq_lens_q`, as for flash-attention.
    """
    ids, types = features["input_ids"], features.get("token_type_ids")
    if "cu_seq_lens_q" in features:
        lengths = features["cu_seq_lens_q"].diff().tolist()
        rows = [each if each is None else each[0].split(lengths) for each in (ids, types)]
    else:
        masks = features["attention_mask"].bool()
        rows = [
            each if each is None else [row[mask] for row, mask in zip(each, masks, strict=True)]
            for each in (ids, types)
        ]
    return [_tokens(*each) for each in zip(items, rows[0], rows[1] or [None] * len(items), strict=True)]
