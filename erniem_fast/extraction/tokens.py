"""Texts as tokens, with the characters that each of them came from."""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..pretokenization import SPACE
from .windows import sentence_ends

# A long text is tokenized so many characters at a time, because a tokenizer's results take 180 bytes a character, and
# `Tokens` about 6. It is cut before a space or the end of a line between two words, which no token crosses.
STRETCH = 2**15
_BETWEEN_WORDS = re.compile(r"(?<=[\w.,:;!?。，：；！？])[ \n](?=[^\W_])")  # noqa: RUF001


@dataclass(frozen=True)
class Tokens:
    """A text as tokens.

    Args:
        text: the text.
        ids: the tokens' ids, as integers of 32 bits.
        starts, ends: of each token, the first of the characters that it came from, and the one behind the last.
    """

    text: str
    ids: Sequence[int] = field(default_factory=lambda: array("i"))
    starts: Sequence[int] = field(default_factory=lambda: array("i"))
    ends: Sequence[int] = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, size: int) -> "Tokens":
        """The first `size` tokens."""
        return Tokens(self.text, self.ids[:size], self.starts[:size], self.ends[:size])

    @cached_property
    def sentence_ends(self) -> list[int]:
        return sentence_ends(self.text, self.starts, self.ends)


def tokenize(tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Tokenizes texts, without special tokens.

    Tokens for spaces alone are left out, as in PaddleNLP, with whose tokens UIE-M was trained.

    Raises:
        TypeError: `tokenizer` is none.
    """
    if not callable(tokenizer):
        raise TypeError(f"tokenizer={tokenizer!r:.60} is no tokenizer; load it: ErnieMTokenizer.from_pretrained(…).")
    tokens, space = [Tokens(text) for text in texts], tokenizer.convert_tokens_to_ids(SPACE)
    left_out = {space} - {tokenizer.unk_token_id}  # not unknown tokens, where a space is one
    # In Baidu's original tokenisation, a text that begins with an ideograph begins with a token for a space. Stretches
    # would each get such a token, so the text stays whole.
    stretches = _whole if getattr(tokenizer, "pretokenization", None) == "original" else _stretches
    for group in _groups((each, start, stop) for each in tokens for start, stop in stretches(each.text)):
        encoded = tokenizer(
            [each.text[start:stop] for each, start, stop in group],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for (each, shift, _), ids, spans in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            for token, (start, end) in zip(ids, spans, strict=True):
                if token not in left_out:
                    each.ids.append(token)
                    each.starts.append(shift + start)
                    each.ends.append(shift + end)
    return tokens


def _whole(text: str) -> Iterator[tuple[int, int]]:
    yield 0, len(text)


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """Where the parts of a text begin and end."""
    start = 0
    while place := _BETWEEN_WORDS.search(text, start + STRETCH):
        yield start, place.start()
        start = place.start()
    yield start, len(text)


def _groups(stretches: Iterable[tuple[Tokens, int, int]]) -> Iterator[list[tuple[Tokens, int, int]]]:
    """Stretches in a row, of STRETCH characters in all, or little more."""
    group, characters = [], 0
    for stretch in stretches:
        group.append(stretch)
        characters += stretch[2] - stretch[1]
        if characters >= STRETCH:
            yield group
            group, characters = [], 0
    if group:
        yield group
