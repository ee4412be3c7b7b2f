"""How good extraction is: precision, recall and F1 over spans."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .decoding import decode


def span_metrics(prediction, threshold: float = 0.5) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of a model's spans of tokens, for `Trainer(compute_metrics=…)`.

    Args:
        prediction: an `EvalPrediction` of `start_logits` and `end_logits`, and of `start_positions` and
            `end_positions`, `(rows, columns)` each. Columns that `Trainer` has added hold -100.
        threshold: as in extraction.
    """
    starts, ends = (1 / (1 + np.exp(-np.clip(each.astype(np.float64), -50, 50))) for each in prediction.predictions[:2])
    correct = found = wanted = 0
    for start, end, *labels in zip(starts, ends, *prediction.label_ids, strict=True):
        mine = {span[:2] for span in decode(start, end, threshold)}
        gold = {span[:2] for span in decode(labels[0] > 0, labels[1] > 0, 0.5)}
        correct += len(mine & gold)
        found += len(mine)
        # Spans that share a start or an end cannot all be told from the labels.
        wanted += max(len(gold), *((label > 0).sum() for label in labels))
    return _scores(correct, found, int(wanted))


def result_metrics(results: Sequence[dict], gold: Sequence[dict]) -> dict[str, float]:
    """The same over the results of `extract`, nested spans included: each counts with all names and spans above it."""
    mine = [set(_flat(result, ())) for result in results]
    wanted = [set(_flat(result, ())) for result in gold]
    correct = sum(len(a & b) for a, b in zip(mine, wanted, strict=True))
    return _scores(correct, sum(map(len, mine)), sum(map(len, wanted)))


def _flat(result: dict[str, list[dict[str, Any]]], path: tuple) -> Iterable[tuple]:
    for name, spans in result.items():
        for span in spans:
            place = (*path, name, span["text"], span.get("start"), span.get("end"))
            yield place
            yield from _flat(span.get("relations", {}), place)


def _scores(correct: int, found: int, wanted: int) -> dict[str, float]:
    precision, recall = correct / found if found else 0.0, correct / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
