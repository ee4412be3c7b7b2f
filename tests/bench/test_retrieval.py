"""Sentence embeddings, their cosines, and the translations that they find."""

import numpy as np
import pytest

from bench.model.retrieval import accuracy_at_1, cosines, embed, retrieve

X, Y, BETWEEN = np.eye(2)[0], np.eye(2)[1], np.array([0.6, 0.8])


def test_an_embedding_is_the_mean_over_the_sentence_s_own_tokens_at_length_1():
    tokens = np.array([[3, 0], [0, 4], [0, -2], [0, 0]], dtype=np.float32)
    np.testing.assert_allclose(embed(tokens, np.array([2, 1, 1])), [[0.6, 0.8], [0, -1], [0, 0]], atol=1e-15)


def test_cosines_are_those_of_one_sentence_in_both():
    assert cosines(np.stack([X, Y, BETWEEN]), np.stack([X, X, Y])).tolist() == [1.0, 0.0, 0.8]


def test_the_nearest_candidate_has_to_be_right():
    queries, candidates = np.stack([X, Y, BETWEEN]), np.stack([X, Y, -X])
    assert accuracy_at_1(queries, candidates, np.eye(3, dtype=bool)) == pytest.approx(2 / 3)


def test_a_tie_counts_as_the_chance_to_draw_the_right_one():
    same = np.stack([X] * 4)
    assert accuracy_at_1(same, same, np.eye(4, dtype=bool)) == 0.25
    # The first query has its answer tied with a wrong one, the second has its answer alone in front.
    assert accuracy_at_1(np.stack([X, Y]), np.stack([X, Y, X]), np.eye(2, 3, dtype=bool)) == 0.75


@pytest.mark.filterwarnings("error")
def test_a_query_that_is_no_number_finds_nothing():
    assert accuracy_at_1(np.stack([X * np.nan, Y]), np.stack([X, Y]), np.ones((2, 2), dtype=bool)) == 0.5


def test_a_sentence_of_several_pairs_is_one_query_with_several_right_answers():
    # "a" and "b" have the same translation, which is nearer to "a"; "c" is nearest to a wrong one.
    embeddings = {"a": X, "b": BETWEEN, "c": Y, "A": X, "C": -Y}
    found = retrieve([("a", "A"), ("b", "A"), ("c", "C")], embeddings)
    assert found.from_english == pytest.approx(2 / 3)  # a, b; not c
    assert found.to_english == 0.5  # A finds a; C finds a too, at 0 before -0.8 and -1
    assert found.mean == pytest.approx(7 / 12)
    either = retrieve([("a", "C"), ("a", "A")], embeddings)
    assert (either.from_english, either.to_english) == (1.0, 1.0)
