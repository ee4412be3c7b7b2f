import itertools
import random

import numpy as np
import pytest

from erniem_fast.extraction.decoding import decode


def spans(starts, ends, length=12, **options):
    scores = np.full((2, length), 0.1)
    scores[0, starts], scores[1, ends] = 0.9, 0.8
    return [(span.first, span.last) for span in decode(*scores, 0.5, **options)]


@pytest.mark.parametrize(
    ("starts", "ends", "apart", "overlapping"),
    [
        ([1, 4], [2, 6], [(1, 2), (4, 6)], [(1, 2), (4, 6)]),
        ([1, 3], [2, 3], [(1, 2), (3, 3)], [(1, 2), (3, 3)]),  # adjacent
        ([1, 3], [5], [(3, 5)], [(1, 5), (3, 5)]),
        ([1], [3, 5], [(1, 3)], [(1, 3), (1, 5)]),
        ([1, 3], [5, 7], [(3, 5)], [(1, 7), (3, 5)]),  # nested
        ([1, 3], [3, 5], [(3, 3)], [(1, 5), (3, 3)]),
        ([4], [2], [], []),
        ([], [2], [], []),
    ],
)
def test_pairs(starts, ends, apart, overlapping):
    assert spans(starts, ends) == apart
    assert spans(starts, ends, overlap=True) == overlapping


def test_probability_is_the_product_and_the_threshold_is_exceeded():
    (span,) = decode(np.array([0.0, 0.75, 0.5]), np.array([0.5, 0.5, 0.75]), 0.5)
    assert span == (1, 2, 0.5625)


def test_spans_do_not_overlap_and_use_each_start_and_end_once():
    draw = random.Random(0)
    for _ in range(300):
        starts, ends = (sorted(draw.sample(range(12), draw.randrange(8))) for _ in range(2))
        found = spans(starts, ends)
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(found))
        # What the original does: from each end back to the last start that no earlier end has taken.
        expected, taken = [], -1
        for end in ends:
            before = [start for start in starts if taken < start <= end]
            if before:
                expected.append((before[-1], end))
            taken = max([taken, *before])
        assert found == expected
        every = spans(starts, ends, overlap=True)
        assert set(found) <= set(every)
        paired = {start for start, _ in every}
        assert paired == {start for start in starts if any(end >= start for end in ends)}
