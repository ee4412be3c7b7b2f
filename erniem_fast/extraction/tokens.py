"""Texts as tokens, with the characters that each of them came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .windows import sentence_ends


@dataclass(frozen=True)
class Tokens:
    """A text as tokens.

    Args:
        text: the text.
        ids: the tokens' ids.
        spans: for each token the characters that it came from, as (start, end).
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sentence_ends(self) -> list[int]:
        return sentence_ends(self.text, self.spans)


def tokenize(tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Tokenizes texts, without special tokens.

    Tokens for spaces alone are left out, as in PaddleNLP, with whose tokens UIE-M was trained.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        _without_spaces(text, ids, spans)
        for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _without_spaces(text: str, ids: list[int], spans: list[tuple[int, int]]) -> Tokens:
    kept = [index for index, (start, end) in enumerate(spans) if not text[start:end].isspace()]
    return Tokens(text, [ids[index] for index in kept], [spans[index] for index in kept])
