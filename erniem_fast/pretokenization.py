"""How SentencePiece's pieces become ERNIE-M's tokens: there have been three ways, and XLM-RoBERTa's is a fourth.

* `transformers`: that of transformers 4.57.6. Pieces are cut at ideographs, punctuation and digits.
* `paddlenlp`: that of PaddleNLP from 2.3.7 on, by which UIE-M was trained. As `transformers`, without lone spaces.
* `original`: that of Baidu's code and of PaddleNLP up to 2.3.4, by which ERNIE-M was pre-trained. Texts lose control
  characters and curly quotes; of the pieces, only a comma after a digit is cut off.
* `sentencepiece`: pieces as they are, as in XLM-RoBERTa.
"""

import unicodedata
from collections.abc import Callable, Iterator

WAYS = ("transformers", "paddlenlp", "original", "sentencepiece")

SPACE = "▁"  # SentencePiece's symbol for a space

_ASCII = {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-"}  # noqa: RUF001


def check_way(way: str) -> None:
    """
    Raises:
        ValueError: there is no such way.
    """
    if way not in WAYS:
        raise ValueError(f"pretokenization={way!r} is unknown; use one of {', '.join(WAYS)}.")


def cleaned(text: str) -> Iterator[tuple[int, str]]:
    """The characters that `original` leaves of a text, and where each was."""
    for index, character in enumerate(text):
        character = _ASCII.get(character, character)
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            yield index, " "
        elif category not in ("Cc", "Cf"):
            yield index, character


def without_digit_commas(pieces: list[str], encode: Callable[[str], list[str]]) -> Iterator[str]:
    """The pieces of `original`: one that ends in a digit and a comma is encoded again without the comma."""
    for piece in pieces:
        if len(piece) < 2 or piece[-1] != "," or not piece[-2].isdigit():
            yield piece
            continue
        again = encode(piece[:-1].replace(SPACE, ""))
        if not piece.startswith(SPACE) and again[0].startswith(SPACE):
            again[0] = again[0].removeprefix(SPACE)
        yield from filter(None, again)
        yield ","
