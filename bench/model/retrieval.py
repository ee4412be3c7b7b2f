"""Sentence embeddings, how near two kinds of them are, and how well one kind finds translations."""

import numpy as np

from bench.model.figures import Retrieval


def embed(hidden_states: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The mean over the tokens of each sentence, at length 1.

    Args:
        hidden_states: `(tokens, features)`, of one sentence after another.
        lengths: `(sentences,)`, the tokens of each, at least one.

    Returns:
        `(sentences, features)` in float64. A mean of zero stays zero.
    """
    sums = np.add.reduceat(hidden_states, np.cumsum(lengths) - lengths, axis=0, dtype=np.float64)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def cosines(embeddings: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`(sentences,)`, between rows of length 1."""
    return np.einsum("ij,ij->i", embeddings, reference)


def accuracy_at_1(queries: np.ndarray, candidates: np.ndarray, right: np.ndarray) -> float:
    """The share of queries whose nearest candidate is right.

    Of candidates that are equally near, one is drawn: a query counts as the chance that it is right. So embeddings that
    are all the same find no more than chance does, and a query that is no number finds nothing.

    Args:
        queries, candidates: `(sentences, features)`, rows of length 1.
        right: `(queries, candidates)`, True for right answers.
    """
    similarities = queries @ candidates.T
    nearest = similarities == similarities.max(axis=1, keepdims=True)
    return float(np.mean((nearest & right).sum(1) / np.maximum(nearest.sum(1), 1)))


def retrieve(pairs: list[tuple[str, str]], embeddings: dict[str, np.ndarray]) -> Retrieval:
    """Accuracy between English and another language, among the sentences of `pairs`.

    Args:
        pairs: an English sentence and its translation each. A sentence in several pairs has several right answers.
        embeddings: `(features,)` of each sentence.
    """
    english, foreign = (dict.fromkeys(texts) for texts in zip(*pairs, strict=True))
    related = set(pairs)
    right = np.array([[(one, other) in related for other in foreign] for one in english])
    ours, theirs = (np.stack([embeddings[text] for text in texts]) for texts in (english, foreign))
    return Retrieval(accuracy_at_1(ours, theirs, right), accuracy_at_1(theirs, ours, right.T))
