"""Batches by tokens, from texts of any number, in windows that bound the memory; results in the order of the texts."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..inputs import as_integer

_LOG = logging.getLogger(__name__)

# At base size, the largest activations of so many tokens, those of the feed-forward network, take 100 MB in float32.
TOKENS_PER_BATCH = 8192

# Texts are tokenised and sorted by length a window at a time: enough that one batch which is not full matters little,
# and few enough that their tokens take megabytes.
WINDOW_TEXTS = 1024
WINDOW_CHARACTERS = 2**20

Item = TypeVar("Item")


class Tokens(NamedTuple):
    """The tokens of one text.

    Attributes:
        ids: int64 `(tokens,)`, at least one.
        types: int64 `(tokens,)`, token types; None where the tokenizer returns none.
    """

    ids: Tensor
    types: Tensor | None


class Steps(NamedTuple):
    """How one model computes something of texts.

    Attributes:
        tokenize: from a window of texts to their tokens.
        compute: from the tokens of a batch to a result for each of its texts.
        pads: whether the model computes padding, so that a batch counts as many tokens as its longest text has, for
            each of its texts.
        limit: the number of tokens at which a text is cut off.
    """

    tokenize: Callable[[list], list[Tokens]]
    compute: Callable[[list[Tokens]], Tensor | list]
    pads: bool
    limit: int


def run(
    items: Iterable[Item], steps: Steps, tokens_per_batch: int, show_progress_bar: bool | None, total: int | None
) -> Iterator[tuple[list[Item], Tensor | list]]:
    """Windows of items, each with its results in the items' order.

    Args:
        items: texts, or pairs of texts.
        steps: how to compute a result of them.
        tokens_per_batch: the tokens of a batch, at most, unless a single text has more.
        show_progress_bar: None for a bar if the standard error is a terminal.
        total: the number of items; None if it is not known.

    Raises:
        ValueError: `tokens_per_batch` is no integer, or less than 1.
    """
    tokens_per_batch = as_integer("tokens_per_batch", tokens_per_batch, 1)
    disable = None if show_progress_bar is None else not show_progress_bar
    return _run(items, steps, tokens_per_batch, tqdm(total=total, unit="texts", desc="Texts", disable=disable))


def _run(
    items: Iterable[Item], steps: Steps, tokens_per_batch: int, bar: tqdm
) -> Iterator[tuple[list[Item], Tensor | list]]:
    seen = cut = 0
    with bar:
        for window in windows(items):
            tokens = steps.tokenize(window)
            lengths = [len(each.ids) for each in tokens]
            seen, cut = seen + len(window), cut + sum(length >= steps.limit for length in lengths)
            parts, order = [], []
            for batch in by_tokens(lengths, tokens_per_batch, steps.pads):
                parts.append(steps.compute([tokens[index] for index in batch]))
                order += batch
                bar.update(len(batch))
            yield window, _in_order(parts, order)
    if cut:
        _LOG.warning("%d of %d texts reached the limit of %d tokens; what follows is cut off.", cut, seen, steps.limit)


def windows(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Consecutive items, until a window holds WINDOW_TEXTS of them or WINDOW_CHARACTERS."""
    window, characters = [], 0
    for item in items:
        window.append(item)
        characters += len(item) if isinstance(item, str) else sum(map(len, item))
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def by_tokens(lengths: Sequence[int], tokens_per_batch: int, pads: bool) -> Iterator[list[int]]:
    """The indices of each batch, longest texts first, so that the largest batch comes first.

    Args:
        lengths: the number of tokens of each text.
        tokens_per_batch: the sum of the lengths in a batch at most, unless it has a single text.
        pads: whether each text counts as many tokens as the longest of its batch.
    """
    batch, size = [], 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        more = lengths[batch[0] if pads and batch else index]
        if batch and size + more > tokens_per_batch:
            yield batch
            batch, size, more = [], 0, lengths[index]
        batch.append(index)
        size += more
    if batch:
        yield batch


def _in_order(parts: Sequence[Tensor | list], order: Sequence[int]) -> Tensor | list:
    """The results of batches, of texts with these indices, in the order of the indices."""
    if isinstance(parts[0], Tensor):
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)
    results = [result for part in parts for result in part]
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda each: each[0])]
