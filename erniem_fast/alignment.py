"""Where the tokens of a text came from: their characters, and their words."""

from collections.abc import Iterator, Sequence

from sentencepiece import SentencePieceProcessor

from .pretokenization import SPACE


class AlignedText:
    """A string that records where in the input each of its characters came from.

    Args:
        text: the string.
        positions: for each character of `text` the index of its source in the input, ascending.
    """

    __slots__ = ("positions", "text")  # a frozen dataclass takes three times as long to make

    def __init__(self, text: str, positions: Sequence[int]):
        self.text, self.positions = text, positions

    def __getitem__(self, part: slice) -> "AlignedText":
        return AlignedText(self.text[part], self.positions[part])

    def __add__(self, other: "AlignedText") -> "AlignedText":
        return AlignedText(self.text + other.text, [*self.positions, *other.positions])

    def lstrip(self) -> "AlignedText":
        return self[len(self.text) - len(self.text.lstrip()) :]

    def rstrip(self) -> "AlignedText":
        return self[: len(self.text.rstrip())]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span of the input that characters `start` to `end` came from; empty for characters that were added."""
        last = self.positions[end - 1] + 1
        return (self.positions[start] if start < end else last), last


class Part:
    """An added token in a text, or what stands between added tokens.

    Args:
        text: the part of the text.
        tokens: the added token; None until what stands between added tokens is tokenized.
    """

    __slots__ = ("is_added", "text", "tokens")

    def __init__(self, text: AlignedText, tokens: list[str] | None = None):
        self.text, self.tokens, self.is_added = text, tokens, tokens is not None


def align(parts: Sequence[Part], model: SentencePieceProcessor) -> tuple[list[tuple[int, int]], list[int]]:
    """Finds the characters and the words that the tokens of a text came from.

    Words are what spaces separate after normalisation. An added token is a word of its own.

    Returns:
        For each token the (start, end) of its characters, and the number of its word; both ascend.

    Raises:
        ValueError: the tokens do not spell the text, because of `sp_model_kwargs` or byte fallback.
    """
    spans, words, word = [], [], -1
    for part in parts:
        if part.is_added:
            found = [(part.text.span(0, len(part.text.text)), True)]
        else:
            found = _align_part(part.text, part.tokens, model)
        for span, starts_word in found:
            word += starts_word
            spans.append(span)
            words.append(word)
    return spans, words


def _align_part(
    text: AlignedText, tokens: list[str], model: SentencePieceProcessor
) -> Iterator[tuple[tuple[int, int], bool]]:
    """For each token its span of the input, and whether a word starts with it."""
    # SentencePiece returns where in `text` each character of the normalised text begins. The tokens spell the
    # normalised text, except for dropped spaces.
    normalized, starts = model.normalize(text.text, with_offsets=True)
    ends = starts[1:]
    for index in range(len(ends) - 2, -1, -1):
        if ends[index] == starts[index]:
            # One character became several: all of them end where the last one ends.
            ends[index] = ends[index + 1]
    place = done = 0
    for token in tokens:
        while normalized[place : place + 1] == SPACE and not normalized.startswith(token, place):
            place += 1
        if not normalized.startswith(token, place):
            raise ValueError(
                f"offsets need SentencePiece pieces that spell the text, but {token!r} is not in "
                f"{normalized[place:]!r}: leave add_bos, add_eos, reverse and emit_unk_piece out of "
                f"sp_model_kwargs, and use a model without byte fallback"
            )
        first, last = _letters(token, place, len(normalized))
        yield text.span(starts[first], ends[last]), done == 0 or SPACE in normalized[done:first]
        place = done = place + len(token)


def _letters(token: str, place: int, end: int) -> tuple[int, int]:
    """The first and the last character that the span of the token at `place` is made of.

    Spaces at a token's ends are left out. A token of nothing but spaces has the character after it, as in fast
    tokenizers, if there is one.
    """
    letters = token.strip(SPACE)
    if letters:
        first = place + token.index(letters)
        return first, first + len(letters) - 1
    after = min(place + len(token), end - 1)
    return after, after
