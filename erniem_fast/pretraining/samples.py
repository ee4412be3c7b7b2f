"""Records, samples, and the packing of samples into a model's input."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..modeling import IGNORED_LABEL

OBJECTIVES = ("mmlm", "tlm", "camlm", "btmlm")
NO_LANGUAGE = -1


class Sentence(NamedTuple):
    """A text, and the name of its language if an objective needs it."""

    text: str
    language: str | None = None


class Pair(NamedTuple):
    """A text and its translation, and the names of their languages if an objective needs them."""

    source: str
    target: str
    source_language: str | None = None
    target_language: str | None = None


@dataclass
class Sample:
    """A sequence of tokens with what is to be predicted.

    Attributes:
        objective: one of `OBJECTIVES`.
        input_ids, labels: of each token; a label is -100 if the token is not to be predicted.
        position_ids: of each token, counted from 0. Tokens may stand in another order than in the text.
        key_ranges: for each token `[first, end]`: it attends to the tokens of the sequence from first to end - 1. None
            if every token attends to all.
        language_ids: for each token the row of the language embeddings that is added to it, -1 for none; None if no
            token gets one.
        source_length: for BTMLM the number of tokens before the pseudo tokens' part; otherwise 0.
        pseudo: for BTMLM the places of the pseudo tokens, which the model has to fill in.
        temperature: for BTMLM of the drawing of pseudo tokens; 0 takes the most likely ones.
    """

    objective: str
    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    key_ranges: list[list[int]] | None = None
    language_ids: list[int] | None = None
    source_length: int = 0
    pseudo: tuple[int, ...] | list[int] = ()
    temperature: float = 0.0

    def __len__(self) -> int:
        return len(self.input_ids)


def pack(samples: Sequence[Sample], with_pseudo_tokens: bool = False) -> dict[str, Any]:
    """One sample after another, in one row: the arguments of `ErnieMForPreTraining.forward`.

    Args:
        samples: at least one, of any objectives.
        with_pseudo_tokens: whether the result has BTMLM's fields even if none of the samples is BTMLM's. The model then
            runs twice all the same, as it has to where several processes with sharded weights run together.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 `(1, tokens)`; `cu_seq_lens_q`, int32 `(samples + 1,)`;
        `max_length_q`, an int; `objective_ids`, int64 `(samples,)`, places in `OBJECTIVES`. Where a sample has them:
        `key_ranges`, int32 `(tokens, 2)`; `language_ids`, int64 `(1, tokens)`; and for BTMLM `pseudo_tokens`, bool
        `(1, tokens)`, `source_lengths`, int64 `(samples,)`, and `temperatures`, float32 `(samples,)`.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("There are no samples to pack; every text was empty or held nothing that can be predicted.")
    lengths = list(map(len, samples))
    packed = {
        name: torch.tensor([[each for sample in samples for each in getattr(sample, name)]])
        for name in ("input_ids", "labels", "position_ids")
    }
    packed["cu_seq_lens_q"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    packed["max_length_q"] = max(lengths)
    packed["objective_ids"] = torch.tensor([OBJECTIVES.index(sample.objective) for sample in samples])
    if any(sample.key_ranges is not None for sample in samples):
        ranges = [sample.key_ranges or [[0, len(sample)]] * len(sample) for sample in samples]
        packed["key_ranges"] = torch.tensor([each for one in ranges for each in one], dtype=torch.int32)
    if any(sample.language_ids is not None for sample in samples):
        ids = [sample.language_ids or [NO_LANGUAGE] * len(sample) for sample in samples]
        packed["language_ids"] = torch.tensor([[each for one in ids for each in one]])
    if with_pseudo_tokens or any(sample.source_length for sample in samples):
        packed |= _pack_pseudo_tokens(samples)
    return packed


def _pack_pseudo_tokens(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    pseudo = [index in places for sample in samples for places in [set(sample.pseudo)] for index in range(len(sample))]
    return {
        "pseudo_tokens": torch.tensor([pseudo]),
        "source_lengths": torch.tensor([sample.source_length for sample in samples]),
        "temperatures": torch.tensor([sample.temperature for sample in samples]),
    }


def check_languages(languages: Sequence[str]) -> list[str]:
    """The names as a list, if they are different texts."""
    if isinstance(languages, str) or len(set(languages)) < len(languages):
        raise ValueError(f"languages={languages!r} must be a list of names, none of them twice.")
    return list(languages)


def unlabelled(count: int) -> list[int]:
    """Labels of tokens that are not to be predicted."""
    return [IGNORED_LABEL] * count
