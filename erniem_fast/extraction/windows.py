"""Windows over the tokens of long texts: they end where sentences end, and neighbours overlap."""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

SENTENCE_ENDS = frozenset("。！？!?…؟।")  # noqa: RUF001
CLOSING = frozenset("”’」』）)]\"'")  # noqa: RUF001


def sentence_ends(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of tokens after which a sentence or a line of `text` ends, ascending.

    Args:
        text: the text.
        spans: for each token, the characters that it came from.
    """
    ends = []
    for index, (_, end) in enumerate(spans):
        before = text[max(end - 2, 0) : end]
        # The spaces up to the next token, and its first character.
        after = text[end : spans[index + 1][0] + 1] if index + 1 < len(spans) else ""
        closes = before[-1:] in CLOSING and before[0] in SENTENCE_ENDS | {"."}
        stops = before[-1:] in SENTENCE_ENDS or (before[-1:] == "." and after[:1].isspace())
        if "\n" in after[:-1] or closes or (stops and after[:1] not in CLOSING | SENTENCE_ENDS):
            ends.append(index + 1)
    return ends


def cut(length: int, size: int, ends: Sequence[int]) -> list[slice]:
    """Windows of at most `size` tokens that cover `length` tokens.

    A window ends at the last of `ends`, the ends of sentences, in its second half, or else where it is full. The next
    one begins an eighth to a quarter of `size` before, after the end of a sentence where there is one.
    """
    windows, start, overlap = [], 0, size // 8
    while start + size < length:
        stop = _last(ends, start + size // 2 + 1, start + size) or start + size
        windows.append(slice(start, stop))
        start = _last(ends, max(stop - 2 * overlap, start + 1), stop - overlap) or stop - overlap
    windows.append(slice(start, length))
    return windows


def _last(ends: Sequence[int], low: int, high: int) -> int | None:
    """The last of `ends` in `[low, high]`."""
    index = bisect.bisect_right(ends, high) - 1
    return ends[index] if index >= 0 and ends[index] >= low else None


def merge(windows: Sequence[slice], scores: Sequence[np.ndarray]) -> np.ndarray:
    """The scores of all tokens, from those of each window: `(…, tokens)` each.

    Where windows overlap, the middle of the overlap divides them, so that a token's score is that of the window which
    shows more of its surroundings.
    """
    bounds = [0]
    bounds += [(left.stop + right.start) // 2 for left, right in itertools.pairwise(windows)]
    bounds.append(windows[-1].stop)
    parts = [
        score[..., low - window.start : high - window.start]
        for window, score, (low, high) in zip(windows, scores, itertools.pairwise(bounds), strict=True)
    ]
    return np.concatenate(parts, axis=-1)


def share_a_window(windows: Sequence[slice], start: int, stop: int) -> bool:
    """Whether one of the windows shows all tokens from `start` to `stop`."""
    latest = bisect.bisect_right([window.start for window in windows], start) - 1
    return windows[latest].stop >= stop
