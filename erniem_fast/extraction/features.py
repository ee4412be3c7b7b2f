"""Examples as rows of tokens with their labels, and the collator that makes batches of them for `Trainer`."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import windows
from .examples import Example
from .scoring import LEAST_ROOM, SPECIAL_TOKENS, Row
from .tokens import Tokens, tokenize


def make_features(tokenizer, examples: Sequence[Example], max_length: int = 512) -> list[dict[str, list[int]]]:
    """Rows for training: `input_ids`, and `start_positions` and `end_positions` of 0 and 1, a number for each token.

    A long text becomes several rows, the windows that extraction cuts it into. An answer is labelled in every window
    that shows all of it. Answers that no window shows, or that begin or end within a token, are counted in a warning;
    rows that show a part of one are left out, because they would teach that it is none.

    Raises:
        ValueError: a prompt is too long for `max_length`; the message has its number.
    """
    contents = dict.fromkeys(example.content for example in examples)
    prompts = dict.fromkeys(example.prompt for example in examples)
    contents, prompts = (dict(zip(each, tokenize(tokenizer, list(each)), strict=True)) for each in (contents, prompts))
    features, lost, inexact = [], 0, 0
    for number, example in enumerate(examples):
        prompt, text = prompts[example.prompt], contents[example.content]
        room = max_length - len(prompt) - SPECIAL_TOKENS
        if room < LEAST_ROOM:
            raise ValueError(
                f"examples[{number}].prompt={example.prompt[:60]!r} has {len(prompt)} tokens and leaves room for "
                f"{max(room, 0)} of max_length={max_length}, where a text needs {LEAST_ROOM}; shorten it."
            )
        places = [_place(answer, prompt, text) for answer in example.result_list]
        inexact += places.count(None)
        answers = [place for place in places if place is not None]
        cut = windows.cut(len(text), room, text.sentence_ends)
        lost += sum(not _in_prompt(each) and not windows.share_a_window(cut, each[0], each[1] + 1) for each in answers)
        if None not in places:
            rows = (_label(tokenizer, prompt, text, window, answers) for window in cut)
            features += [row for row in rows if row is not None]
    if lost or inexact:
        warnings.warn(
            f"{lost} answers are too long for a row of max_length={max_length} tokens, and {inexact} begin or end "
            f"within a token; the rows that would show a part of them are left out.",
            stacklevel=2,
        )
    return features


def _in_prompt(place: tuple[int, int]) -> bool:
    return place[1] < 0


def _place(answer, prompt: Tokens, text: Tokens) -> tuple[int, int] | None:
    """The first and the last token of an answer, in a prompt counted from its end; None if they are not its bounds."""
    if answer.end >= 0:
        return _tokens_of(text, answer.start, answer.end)
    shift = len(prompt.text) + 1
    found = _tokens_of(prompt, answer.start + shift, answer.end + shift)
    return None if found is None else (found[0] - len(prompt), found[1] - len(prompt))


def _tokens_of(tokens: Tokens, start: int, end: int) -> tuple[int, int] | None:
    """Spaces at the ends of an answer belong to no token."""
    inside = tokens.text[start:end]
    start, end = start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())
    if start not in tokens.starts or end not in tokens.ends:
        return None
    first, last = tokens.starts.index(start), len(tokens) - 1 - tokens.ends[::-1].index(end)
    return None if last < first else (first, last)


def _label(
    tokenizer, prompt: Tokens, text: Tokens, window: slice, answers: Sequence[tuple[int, int]]
) -> dict[str, list[int]] | None:
    row = Row(prompt.ids, text.ids[window])
    starts, ends = [0] * len(row), [0] * len(row)
    for first, last in answers:
        if _in_prompt((first, last)):
            first, last = (row.prompt_columns().stop + each for each in (first, last))
        elif last < window.start or first >= window.stop:
            continue
        elif first < window.start or last >= window.stop:
            return None
        else:
            first, last = (row.text_columns().start + each - window.start for each in (first, last))
        starts[first] = ends[last] = 1
    ids = row.ids(tokenizer.cls_token_id, tokenizer.sep_token_id)
    return {"input_ids": ids, "start_positions": starts, "end_positions": ends}


@dataclass
class ExtractionCollator:
    """Makes a batch of the rows of `make_features`.

    The model's loss is over real tokens. For PaddleNLP's loss, which is over padding too, pass `padded_length=512` and
    set `ERNIEM_FAST_PACKING=0`.

    Args:
        tokenizer: the tokenizer that the rows were made with.
        padded_length: the columns of every batch; by default those of its longest row.
    """

    tokenizer: Any
    padded_length: int | None = None

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `start_positions` and `end_positions`, int64 `(rows, columns)`.

        Raises:
            ValueError: a row is longer than `padded_length`.
        """
        columns = max(len(row["input_ids"]) for row in rows)
        if self.padded_length is not None and columns > self.padded_length:
            raise ValueError(f"padded_length={self.padded_length} is less than a row's {columns} tokens; raise it.")
        columns = self.padded_length or columns
        fill = {"input_ids": self.tokenizer.pad_token_id, "start_positions": 0, "end_positions": 0}
        batch = {
            name: torch.tensor([row[name] + [value] * (columns - len(row[name])) for row in rows])
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return batch | {"attention_mask": (torch.arange(columns) < lengths[:, None]).long()}
