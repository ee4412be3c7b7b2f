"""The rows of a call as `tokenizers.Encoding`s, by which BatchEncoding answers word_ids(), char_to_token() and more.

Most calls are never asked these questions, so a row's Encoding is made when it is asked for.
"""

import json
from collections.abc import Sequence
from types import NoneType
from typing import NamedTuple

import tokenizers
from sentencepiece import SentencePieceProcessor

from .alignment import Part, align


class EncodedSequence:
    """A text, a list of words, or a list of ids, as tokens without special tokens.

    Args:
        ids: the tokens' ids.
        texts: the parts of the text, or of each word; None for ids.
        is_split_into_words: whether there are words.
        model: what cut the texts into pieces.
    """

    __slots__ = ("_alignment", "ids", "is_split_into_words", "model", "texts")

    def __init__(
        self, ids: list[int], texts: list[list[Part]] | None, is_split_into_words: bool, model: SentencePieceProcessor
    ):
        self.ids, self.texts, self.is_split_into_words, self.model = ids, texts, is_split_into_words, model
        self._alignment = None

    @property
    def tokens(self) -> list[str]:
        return self._align()[2]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The characters of each token; those of a word are counted from its start."""
        return self._align()[0]

    @property
    def words(self) -> list[int]:
        """The number of each token's word: its index, or counted in the text."""
        return self._align()[1]

    def _align(self) -> tuple[list[tuple[int, int]], list[int], list[str]]:
        if self._alignment is not None:
            return self._alignment
        if self.texts is None:
            raise ValueError(
                f"return_offsets_mapping=True and the methods of what is returned, such as word_ids(), need text, not "
                f"the ids {self.ids}: pass strings"
            )
        spans, words, tokens = [], [], []
        for index, parts in enumerate(self.texts):
            text_spans, text_words = align(parts, self.model)
            spans += text_spans
            words += [index] * len(text_words) if self.is_split_into_words else text_words
            tokens += [token for part in parts for token in part.tokens]
        self._alignment = spans, words, tokens
        return self._alignment


class Row(NamedTuple):
    """What a row holds of one or two sequences."""

    sequences: tuple[EncodedSequence, ...]
    windows: tuple[slice, ...]

    def cut(self, name: str) -> list[list]:
        """The attribute `name` of each sequence, as far as it is in the row."""
        return [getattr(each, name)[window] for each, window in zip(self.sequences, self.windows, strict=True)]


class Encodings(Sequence):
    """The Encodings of a call's rows.

    Args:
        tokenizer: what arranges rows: an ErnieMTokenizer.
        rows: the rows, without special tokens and padding.
        lengths: the number of each row's tokens, with special tokens and padding.
        add_special_tokens: whether rows have special tokens.
        padding_side: where rows have padding, "right" or "left".
    """

    def __init__(self, tokenizer, rows: list[Row], lengths: list[int], add_special_tokens: bool, padding_side: str):
        self._tokenizer, self._rows, self._lengths = tokenizer, rows, lengths
        self._add_special_tokens, self._padding_side = add_special_tokens, padding_side
        self._made: dict[int, tokenizers.Encoding] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> tokenizers.Encoding | list[tokenizers.Encoding]:
        """
        Raises:
            ValueError: the row is made of ids; or the tokens do not spell the text.
        """
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[each] for each in place]
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def __reduce__(self):
        # The pickle holds the Encodings themselves, because the model that they are made with is large. Where they
        # cannot be made, nothing takes their place.
        try:
            return list, (self[:],)
        except ValueError:
            return NoneType, ()

    def _make(self, index: int) -> tokenizers.Encoding:
        row, tokenizer = self._rows[index], self._tokenizer
        fields = tokenizer.arrange(
            row, self._add_special_tokens, return_token_type_ids=True, return_special_tokens_mask=True
        )
        ids, special = fields["input_ids"], fields["special_tokens_mask"]
        inner = [place for place, is_special in enumerate(special) if not is_special]
        encoding = _encoding(
            ids=ids,
            type_ids=fields["token_type_ids"],
            tokens=_scatter(row.cut("tokens"), inner, tokenizer.convert_ids_to_tokens(ids)),
            words=_scatter(row.cut("words"), inner, [None] * len(ids)),
            offsets=_scatter(row.cut("spans"), inner, [(0, 0)] * len(ids)),
            special_tokens_mask=special,
            attention_mask=[1] * len(ids),
            overflowing=[],
            sequence_ranges=_ranges(row, inner),
        )
        encoding.pad(
            self._lengths[index],
            direction=self._padding_side,
            pad_id=tokenizer.pad_token_id,
            pad_type_id=tokenizer.pad_token_type_id,
            pad_token=tokenizer.pad_token,
        )
        return encoding


def _encoding(**fields) -> tokenizers.Encoding:
    """An Encoding with these fields, which are those of its pickles."""
    encoding = tokenizers.Encoding()
    encoding.__setstate__(json.dumps(fields).encode())
    return encoding


def _scatter(values: list[list], places: list[int], into: list) -> list:
    """Writes the values of all sequences, one after another, to their places."""
    flat = [value for sequence in values for value in sequence]
    for place, value in zip(places, flat, strict=True):
        into[place] = value
    return into


def _ranges(row: Row, places: list[int]) -> dict[int, dict[str, int]]:
    """Where each sequence starts and ends in a row, whose tokens of text have these places."""
    ranges, done = {}, 0
    for number, sequence in enumerate(row.cut("ids")):
        own = places[done : done + len(sequence)]
        ranges[number] = {"start": own[0], "end": own[-1] + 1} if own else {"start": 0, "end": 0}
        done += len(sequence)
    return ranges
