"""Exact match and F1 of answers, normalised as SQuAD's and MLQA's evaluation scripts do it."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Articles that MLQA leaves out of answers, by language.
ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "hi": None,
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",  # noqa: RUF001
    "zh": None,
}
IDEOGRAPHS = re.compile(r"[\u4e00-\u9fa5]")


def answer_metrics(predictions: Sequence[str], answers: Sequence[Sequence[str]], lang: str = "en") -> dict[str, float]:
    """The mean exact match and F1 over questions, each with the best of its answers, in percent.

    Args:
        predictions: the predicted answers; `""` for none.
        answers: for each question its right answers; `[]` or `[""]` for none.
        lang: the language of the answers, one of MLQA's.

    Raises:
        ValueError: `lang` is not one of these, or the numbers of predictions and answers differ.
    """
    if lang not in ARTICLES:
        raise ValueError(f"lang={lang!r} is not one of MLQA's languages: {', '.join(ARTICLES)}.")
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(f"predictions has {len(predictions)} texts and answers {len(answers)}; give answers to each.")
    exact = f1 = 0.0
    for prediction, mine in zip(predictions, answers, strict=True):
        mine, found = [normalise(answer, lang) for answer in mine or [""]], normalise(prediction, lang)
        exact += max(found == answer for answer in mine)
        f1 += max(_f1(_words(found, lang), _words(answer, lang)) for answer in mine)
    return {"exact_match": 100 * exact / len(predictions), "f1": 100 * f1 / len(predictions)}


def normalise(text: str, lang: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces."""
    text = "".join(character for character in text.lower() if not _is_punctuation(character))
    if ARTICLES[lang] is not None:
        text = re.sub(ARTICLES[lang], " ", text)
    return " ".join(_words(text, lang))


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _words(text: str, lang: str) -> list[str]:
    """In Chinese, ideographs are words."""
    return (IDEOGRAPHS.sub(r" \g<0> ", text) if lang == "zh" else text).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))
