# ruff: noqa: RUF001
import itertools
import random

from erniem_fast.extraction.windows import (
    connected,
    cut,
    cut_sentences,
    own_tokens,
    sentence_ends,
    share_a_window,
)


def test_sentences_end_at_marks_and_lines():
    text = "Go on. 3.5 m? “No.” Yes！他说：“好。”\nend"
    spans = [(i, i + 1) for i, letter in enumerate(text) if not letter.isspace()]
    starts, stops = zip(*spans, strict=True)
    ends = [text[: stops[end - 1]].rsplit(" ", 1)[-1] for end in sentence_ends(text, starts, stops)]
    assert ends == ["on.", "m?", "“No.”", "Yes！", "Yes！他说：“好。”"]


def test_a_text_that_fits_is_one_window():
    assert cut(20, 20, [5]) == [slice(0, 20)]


def test_windows_end_at_sentences_and_overlap():
    assert cut(40, 16, [10, 13, 20, 26]) == [slice(0, 13), slice(10, 26), slice(24, 40)]


def test_windows_cover_all_tokens_in_bounded_number():
    draw = random.Random(0)
    for _ in range(500):
        length, size = draw.randint(1, 300), draw.randint(2, 60)
        ends = sorted(draw.sample(range(1, length + 1), draw.randint(0, length)))
        windows = cut(length, size, ends)
        assert windows[0].start == 0
        assert windows[-1].stop == length
        assert all(0 < window.stop - window.start <= size for window in windows)
        pairs = list(itertools.pairwise(windows))
        assert all(a.start < b.start <= a.stop < b.stop for a, b in pairs)
        assert all(a.stop - b.start >= size // 8 for a, b in pairs)
        assert len(windows) <= 1 + 4 * length / size
        own = [own_tokens(windows, index) for index in range(len(windows))]
        assert [token for each in own for token in range(each.start, each.stop)] == list(range(length))
        both = zip(windows, own, strict=True)
        assert all(window.start <= each.start <= each.stop <= window.stop for window, each in both)
        assert size < 8 or connected(windows) == [slice(0, len(windows))]
        first = draw.randrange(length)
        stop = draw.randint(first + 1, length)
        shown = any(window.start <= first and stop <= window.stop for window in windows)
        assert share_a_window(windows, first, stop) == shown


def test_where_windows_overlap_the_one_that_shows_more_decides():
    windows = [slice(0, 6), slice(4, 10)]
    assert [own_tokens(windows, index) for index in range(2)] == [slice(0, 5), slice(5, 10)]


def test_sentences_have_windows_of_their_own():
    windows = cut_sentences(20, 8, [2, 14, 20])
    assert windows == [slice(0, 2), slice(2, 10), slice(9, 14), slice(14, 20)]
    assert connected(windows) == [slice(0, 1), slice(1, 3), slice(3, 4)]
