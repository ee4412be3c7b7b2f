"""Windows over the tokens of long texts: they end where sentences end, and neighbours overlap."""

import bisect
import itertools
from collections.abc import Sequence

SENTENCE_ENDS = frozenset("。！？!?…؟।")  # noqa: RUF001
CLOSING = frozenset("”’」』）)]\"'")  # noqa: RUF001


def sentence_ends(text: str, starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The numbers of tokens after which a sentence or a line of `text` ends, ascending.

    Args:
        text: the text.
        starts, ends: of each token, the first of the characters that it came from, and the one behind the last.
    """
    found = []
    for index, end in enumerate(ends):
        before = text[max(end - 2, 0) : end]
        # The spaces up to the next token, and its first character.
        after = text[end : starts[index + 1] + 1] if index + 1 < len(starts) else ""
        closes = before[-1:] in CLOSING and before[0] in SENTENCE_ENDS | {"."}
        stops = before[-1:] in SENTENCE_ENDS or (before[-1:] == "." and after[:1].isspace())
        if "\n" in after[:-1] or closes or (stops and after[:1] not in CLOSING | SENTENCE_ENDS):
            found.append(index + 1)
    return found


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


def cut_sentences(length: int, size: int, ends: Sequence[int]) -> list[slice]:
    """Windows of a sentence each; of sentences of more than `size` tokens, several that overlap."""
    bounds = itertools.pairwise(sorted({0, *ends, length}))
    return [
        slice(start + window.start, start + window.stop)
        for start, stop in bounds
        for window in cut(stop - start, size, ())
    ]


def _last(ends: Sequence[int], low: int, high: int) -> int | None:
    """The last of `ends` in `[low, high]`."""
    index = bisect.bisect_right(ends, high) - 1
    return ends[index] if index >= 0 and ends[index] >= low else None


def own_tokens(windows: Sequence[slice], index: int) -> slice:
    """The tokens of a text for which its window `index` decides.

    Where windows overlap, the middle of the overlap divides them, so that a token's scores are those of the window
    which shows more of its surroundings.
    """
    window = windows[index]
    first = (windows[index - 1].stop + window.start) // 2 if index else window.start
    stop = (window.stop + windows[index + 1].start) // 2 if index + 1 < len(windows) else window.stop
    return slice(first, stop)


def connected(windows: Sequence[slice]) -> list[slice]:
    """The runs of windows that overlap, as slices of `windows`."""
    breaks = [index for index in range(1, len(windows)) if windows[index].start >= windows[index - 1].stop]
    return [slice(*run) for run in itertools.pairwise([0, *breaks, len(windows)])]


def share_a_window(windows: Sequence[slice], start: int, stop: int) -> bool:
    """Whether one of the windows shows all tokens from `start` to `stop`."""
    latest = bisect.bisect_right([window.start for window in windows], start) - 1
    return windows[latest].stop >= stop
