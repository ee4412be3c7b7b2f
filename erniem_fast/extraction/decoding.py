"""From the probabilities of starts and ends to spans of tokens."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """A span of tokens: the first, the last, and the product of the probabilities of its start and its end."""

    first: int
    last: int
    probability: float


def decode(starts: np.ndarray, ends: np.ndarray, threshold: float, overlap: bool = False) -> list[Span]:
    """The spans that `pair` makes of the starts and ends that are more probable than `threshold`: `(tokens,)` each."""
    return pair(above(starts, threshold), above(ends, threshold), overlap)


def above(probabilities: np.ndarray, threshold: float) -> dict[int, float]:
    """The tokens that are more probable than `threshold`, with their probabilities."""
    return {token: float(probabilities[token]) for token in np.flatnonzero(probabilities > threshold).tolist()}


def pair(starts: dict[int, float], ends: dict[int, float], overlap: bool = False) -> list[Span]:
    """Pairs starts and ends.

    Args:
        starts, ends: tokens with their probabilities.
        overlap: whether spans may contain or overlap each other.

    Returns:
        Spans by position. They do not overlap, unless `overlap`: an end is paired with the last start at or before it,
        and starts and ends that are passed over are dropped. With `overlap` starts and ends are paired like brackets;
        then a start without an end takes the next end, and an end without a start takes the last start before it.
    """
    first, last = sorted(starts), sorted(ends)
    pairs = _pair_like_brackets(first, last) if overlap else _pair_nearest(first, last)
    return [Span(start, end, starts[start] * ends[end]) for start, end in sorted(pairs)]


def _events(first: Sequence[int], last: Sequence[int]) -> list[tuple[int, bool]]:
    """Starts (False) and ends (True) by token; of the same token the start comes first."""
    return sorted([(token, False) for token in first] + [(token, True) for token in last])


def _pair_nearest(first: Sequence[int], last: Sequence[int]) -> list[tuple[int, int]]:
    pairs, start = [], None
    for token, is_end in _events(first, last):
        if not is_end:
            start = token
        elif start is not None:
            pairs.append((start, token))
            start = None
    return pairs


def _pair_like_brackets(first: Sequence[int], last: Sequence[int]) -> set[tuple[int, int]]:
    pairs, unpaired, latest = set(), [], None
    for token, is_end in _events(first, last):
        if not is_end:
            unpaired.append(token)
            latest = token
        elif latest is not None:
            pairs.add((unpaired.pop() if unpaired else latest, token))
    for start in unpaired:
        following = bisect.bisect_left(last, start)
        if following < len(last):
            pairs.add((start, last[following]))
    return pairs
