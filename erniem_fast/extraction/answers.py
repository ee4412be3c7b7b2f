"""Extractive question answering: the best spans of contexts of any length, and the score of there being none."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from ..configuration import RESERVED_POSITIONS
from ..inputs import as_integer
from ..tokenization import ErnieMTokenizer
from . import windows
from .scoring import LEAST_ROOM, SPECIAL_TOKENS, Row, Scorer, tokens_of_batch, warn_if_untrained
from .tokens import Tokens, tokenize


@overload
def extract_answer(
    model: nn.Module,
    tokenizer: ErnieMTokenizer,
    question: str,
    context: str,
    *,
    n_best: int = ...,
    no_answer: bool = ...,
    max_answer_tokens: int = ...,
    max_length: int = ...,
    batch_tokens: int = ...,
    progress: bool | None = ...,
) -> list[dict[str, Any]]: ...


@overload
def extract_answer(
    model: nn.Module, tokenizer: ErnieMTokenizer, question: Sequence[str], context: Sequence[str], **options: Any
) -> list[list[dict[str, Any]]]: ...


def extract_answer(
    model: nn.Module,
    tokenizer: ErnieMTokenizer,
    question: str | Sequence[str],
    context: str | Sequence[str],
    *,
    n_best: int = 1,
    no_answer: bool = False,
    max_answer_tokens: int = 30,
    max_length: int = 384,
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
    """Finds the answers to questions in their contexts.

    Long contexts are cut at the ends of sentences, into windows that overlap. The score of a span is the sum of its
    start's and its end's logit, the best of all windows; that of no answer is the sum at [CLS], the least of all
    windows, because a window without the answer has none. As with `Extractor`, call `model.eval()` before several
    threads do this with one model.

    Args:
        model: an `ErnieMForQuestionAnswering`.
        tokenizer: its tokenizer.
        question, context: strings, or lists of the same length.
        n_best: the most answers to a question.
        no_answer: whether none may be an answer, as for models that are trained on SQuAD 2.0.
        max_answer_tokens: the most tokens of an answer.
        max_length: the most tokens of a row, question included.
        batch_tokens: the tokens of a batch, as in `extract`.
        progress: whether to show a bar; None for only where the standard error is a terminal.

    Returns:
        For a question, up to `n_best` answers, the best first: `text`, `start`, `end`, so that `context[start:end]` is
        the text, `score`, and `probability`, the softmax over the candidates that are compared. No answer has the text
        `""` and no start and end. For lists, a list of these.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it, its value and the remedy.
    """
    questions, contexts = _as_lists(question, context)
    n_best, max_answer_tokens, max_length = _check(model, n_best, max_answer_tokens, max_length)
    warn_if_untrained(model, "fine-tune it by examples/finetune_qa.py, or load a checkpoint that answers questions")
    asked, texts = (tokenize(tokenizer, each) for each in (questions, contexts))
    rooms = [_room(number, each, max_length) for number, each in enumerate(asked)]
    cuts = [
        windows.cut(len(text), room, text.sentence_ends) if len(text) else []
        for room, text in zip(rooms, texts, strict=True)
    ]
    places = [(number, window) for number, cut in enumerate(cuts) for window in cut]
    rows = [Row(asked[number].ids, memoryview(texts[number].ids)[window]) for number, window in places]
    candidates: list[dict[tuple[int, int] | None, float]] = [{} for _ in questions]
    with Scorer(model, tokenizer, tokens_of_batch(model, batch_tokens), progress) as scorer:
        for index, logits in scorer.score(rows, of=lambda logits: logits):
            number, window = places[index]
            none = float(logits[:, 0].sum())
            candidates[number][None] = min(none, candidates[number].get(None, none))
            spans = best_spans(*logits[:, rows[index].text_columns()], n_best, max_answer_tokens)
            for first, last, score in spans:
                place = first + window.start, last + window.start
                candidates[number][place] = max(score, candidates[number].get(place, score))
    answers = [_rank(text, found, n_best, no_answer) for text, found in zip(texts, candidates, strict=True)]
    return answers[0] if isinstance(question, str) else answers


def _room(number: int, question: Tokens, max_length: int) -> int:
    """The tokens of a context that a row has room for beside a question."""
    room = max_length - len(question) - SPECIAL_TOKENS
    if room < LEAST_ROOM:
        raise ValueError(
            f"question[{number}]={question.text[:60]!r} has {len(question)} tokens, which leaves less than "
            f"{LEAST_ROOM} of max_length={max_length} for the context; shorten it, or raise max_length."
        )
    return room


def best_spans(starts: np.ndarray, ends: np.ndarray, count: int, longest: int) -> list[tuple[int, int, float]]:
    """The `count` spans of at most `longest` tokens with the largest sums of logits: first token, last token, sum."""
    lengths = min(longest, len(starts))
    padded = np.concatenate([ends, np.full(lengths - 1, -np.inf, ends.dtype)])
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, lengths)
    best = np.argsort(-scores, axis=None, kind="stable")[:count]
    spans = [
        (int(place // lengths), int(place // lengths + place % lengths), float(scores.flat[place])) for place in best
    ]
    return [span for span in spans if np.isfinite(span[2])]


def _rank(
    text: Tokens, candidates: dict[tuple[int, int] | None, float], n_best: int, no_answer: bool
) -> list[dict[str, Any]]:
    none = candidates.pop(None, 0.0)
    found: dict[tuple[int, int] | None, float] = {}
    for (first, last), score in candidates.items():
        place = text.starts[first], text.ends[last]
        found[place] = max(score, found.get(place, score))
    if no_answer or not found:
        found[None] = none
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0] or (-1, -1)))[:n_best]
    scores = np.array(list(found.values()))
    total = np.exp(scores - scores.max()).sum()
    answers = []
    for place, score in ranked:
        answer = (
            {"text": ""} if place is None else {"text": text.text[slice(*place)], "start": place[0], "end": place[1]}
        )
        answers.append(answer | {"score": score, "probability": float(np.exp(score - scores.max()) / total)})
    return answers


def _as_lists(question, context) -> tuple[list[str], list[str]]:
    if isinstance(question, str) and isinstance(context, str):
        return [question], [context]
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
            raise TypeError(f"{name}={value!r:.80} must be a string, or a list of strings like the other argument.")
    if len(question) != len(context):
        raise ValueError(f"question has {len(question)} texts and context {len(context)}; give a context to each.")
    return list(question), list(context)


def _check(model, n_best: int, max_answer_tokens: int, max_length: int) -> tuple[int, int, int]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is no model; load it: ErnieMForQuestionAnswering.from_pretrained(…).")
    most = model.config.max_position_embeddings - RESERVED_POSITIONS
    return (
        as_integer("n_best", n_best, 1),
        as_integer("max_answer_tokens", max_answer_tokens, 1),
        as_integer("max_length", max_length, SPECIAL_TOKENS + LEAST_ROOM + 1, most, ", which the model can read"),
    )


def answer_features(tokenizer, questions, contexts, answers, max_length: int = 384) -> list[dict[str, Any]]:
    """Rows for training: `input_ids`, and the columns `start_positions` and `end_positions` of an answer.

    Windows that do not show all of the answer are labelled with column 0, [CLS], as questions without an answer are.

    Args:
        questions, contexts: lists of strings.
        answers: for each question `(start, end)` in its context, or None for no answer.
        max_length: as in `extract_answer`.

    Raises:
        ValueError: an answer is not within its context, or a question leaves no room for one.
    """
    rows = []
    asked, texts = (tokenize(tokenizer, each) for each in (questions, contexts))
    for number, (question, text, answer) in enumerate(zip(asked, texts, answers, strict=True)):
        first, last = (None, None) if answer is None else _tokens_of(text, *answer)
        room = _room(number, question, max_length)
        for window in windows.cut(len(text), room, text.sentence_ends):
            row = Row(question.ids, text.ids[window])
            shown = first is not None and window.start <= first and last < window.stop
            shift = row.text_columns().start - window.start
            rows.append(
                {
                    "input_ids": row.ids(tokenizer.cls_token_id, tokenizer.sep_token_id),
                    "start_positions": first + shift if shown else 0,
                    "end_positions": last + shift if shown else 0,
                }
            )
    return rows


def _tokens_of(text: Tokens, start: int, end: int) -> tuple[int, int]:
    """The tokens that show the characters from `start` to `end`."""
    inside = [
        i for i, (first, last) in enumerate(zip(text.starts, text.ends, strict=True)) if first < end and last > start
    ]
    if not inside or not 0 <= start < end <= len(text.text):
        raise ValueError(f"the answer [{start}:{end}] is not within {text.text[:60]!r}; give its place in characters.")
    return inside[0], inside[-1]


def collate_answers(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows of `answer_features`: ids and mask `(rows, columns)`, and positions `(rows,)`."""
    columns = max(len(row["input_ids"]) for row in rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [pad_token_id] * (columns - len(row["input_ids"])) for row in rows]
        ),
        "attention_mask": (torch.arange(columns) < lengths[:, None]).long(),
        **{name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")},
    }
