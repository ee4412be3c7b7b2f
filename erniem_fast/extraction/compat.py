"""What PaddleNLP 2.8.1's `Taskflow("information_extraction")` does, known faults included, for comparisons.

Its faults: texts are cut by characters, wherever that falls and without overlap, at lengths that depend on the prompt
that sorts last; with `split_sentence` places are counted without the ends of lines; spans may begin or end at special
tokens, in the prompt, or in both prompt and text; whether answers are options is guessed from the first result of a
level's batch; the spans of a name that a schema repeats are mixed up.
Two things differ: spans are in the order of their positions, which is that of hashes there; and none is at padding.
"""

import itertools
import re
from collections.abc import Iterator

from transformers.tokenization_utils_base import TruncationStrategy

from ..truncation import sizes_to_keep
from .decoding import Span, decode
from .schema import half_width
from .scoring import SPECIAL_TOKENS, Row, Scorer
from .tokens import Tokens, tokenize

SUMMARY_TOKENS = 3  # what PaddleNLP counts for the four special tokens
OPTIONS = re.compile(r"\[.*?\]$")
# A line is broken between the two groups. The second is read too, so that no sentence ends right behind it.
SENTENCE_ENDS = [
    re.compile(pattern)
    for pattern in (r"([。！？?])([^”’])", r"(\.{6})([^”’])", r"(…{2})([^”’])", r"([。！？?][”’])([^，。！？?])")  # noqa: RUF001
]


class _Name:
    """A name of the schema, with the prefixes and the spans of its parent once these are known."""

    def __init__(self, name: str) -> None:
        self.name, self.children, self.prefixes, self.parents = name, [], None, None


def extract(extractor, scorer: Scorer, texts: list[str]) -> list[dict]:
    """The results of `extractor` for each of `texts`; names one after another, breadth first."""
    results = [{} for _ in texts]
    names = _names(extractor.schema)
    for node in names:
        prompts = [_prompts(node, number, extractor.lang) for number in range(len(texts))]
        questions = [(prompt, text) for text, mine in zip(texts, prompts, strict=True) for prompt in mine]
        answers = iter(_answer(extractor, scorer, questions))
        found = [[next(answers) for _ in mine] for mine in prompts]
        if node.parents is None:
            spans = [_extend(result, node.name, mine) for result, mine in zip(results, found, strict=True)]
        else:
            spans = [_relate(parents, node.name, mine) for parents, mine in zip(node.parents, found, strict=True)]
        prefixes = [[span["text"] for answer in mine for span in answer] for mine in found]
        for child in node.children:
            child.prefixes, child.parents = prefixes, spans
            names.append(child)
    return results


def _names(schema) -> list[_Name]:
    names = []
    for each in schema if isinstance(schema, (list, tuple)) else [schema]:
        for name, below in each.items() if isinstance(each, dict) else [(each, [])]:
            names.append(_Name(name))
            names[-1].children = _names(below)
    return names


def _prompts(node: _Name, number: int, lang: str) -> list[str]:
    if node.prefixes is None:
        return [half_width(node.name)]
    return [half_width(_relation(node.name, subject, lang)) for subject in node.prefixes[number]]


def _relation(name: str, subject: str, lang: str) -> str:
    if lang == "zh":
        return f"{subject}的{name}"
    options = OPTIONS.search(name)
    if options is None:
        return f"{name} of {subject}"
    return f"{name[: name.find('[', 1)].strip()} of {subject} {options.group()}"


def _extend(result: dict, name: str, answers: list[list[dict]]) -> list[dict]:
    """Adds the answers to those of the name, and returns all of the name."""
    for answer in filter(None, answers):
        result.setdefault(name, []).extend(answer)
    return list(result.get(name, []))


def _relate(parents: list[dict], name: str, answers: list[list[dict]]) -> list[dict]:
    """Adds to each parent its answer, and returns all spans of the name that parents have."""
    for parent, answer in zip(parents, answers, strict=False):
        if answer:
            parent.setdefault("relations", {}).setdefault(name, []).extend(answer)
    return [span for parent in parents for span in parent.get("relations", {}).get(name, [])]


def _answer(extractor, scorer: Scorer, questions: list[tuple[str, str]]) -> list[list[dict]]:
    """For each prompt and text the spans that were found, the pieces of the text joined."""
    if not questions:
        return []
    size = extractor.max_length - len(max(prompt for prompt, _ in questions)) - SUMMARY_TOKENS
    if size < 1:
        raise ValueError(
            f"schema asks {max(prompt for prompt, _ in questions)!r}, which leaves no room for a text in "
            f"max_length={extractor.max_length}; shorten the name."
        )
    pieces = [
        (number, start, prompt, piece)
        for number, (prompt, text) in enumerate(questions)
        for start, piece in _pieces(text, size, extractor.split_sentence)
    ]
    found = _find(extractor, scorer, [piece[2:] for piece in pieces])
    first = next(filter(None, found), [{"start": 0}])[0]
    joined = [[] for _ in questions]
    for (number, start, _, _), spans in zip(pieces, found, strict=True):
        joined[number].append([_moved(span, start) for span in spans])
    if "start" not in first:
        return [_vote(mine) for mine in joined]
    return [list(itertools.chain(*mine)) for mine in joined]


def _pieces(text: str, size: int, split_sentence: bool) -> Iterator[tuple[int, str]]:
    """The pieces of a text, and where each begins in all of them joined."""
    place = 0
    for sentence in _sentences(text) if split_sentence else [text]:
        for start in range(0, max(len(sentence), 1), size):
            yield place + start, sentence[start : start + size]
        place += len(sentence)


def _sentences(text: str) -> list[str]:
    for end in SENTENCE_ENDS:
        text = end.sub(r"\1\n\2", text)
    return text.rstrip().split("\n")


def _moved(span: dict, by: int) -> dict:
    return span | {"start": span["start"] + by, "end": span["end"] + by} if "start" in span else span


def _vote(pieces: list[list[dict]]) -> list[dict]:
    """The answer that comes first in most pieces, with its mean probability."""
    votes = {}
    for spans in filter(None, pieces):
        votes.setdefault(spans[0]["text"], []).append(spans[0]["probability"])
    if not votes:
        return []
    text, probabilities = max(votes.items(), key=lambda item: (len(item[1]), sum(item[1])))
    return [{"text": text, "probability": sum(probabilities) / len(probabilities)}]


def _find(extractor, scorer: Scorer, pairs: list[tuple[str, str]]) -> list[list[dict]]:
    """The spans of each prompt and piece of a text."""
    prompts, texts = (tokenize(extractor.tokenizer, each) for each in zip(*pairs, strict=True))
    pairs = [_truncate(*each, extractor.max_length) for each in zip(prompts, texts, strict=True)]
    found = [None] * len(pairs)
    for index, (starts, ends) in scorer.score([Row(prompt.ids, text.ids) for prompt, text in pairs]):
        prompt, text = pairs[index]
        spans = decode(starts, ends, extractor.threshold)
        found[index] = list(_read(prompt.text, text.text, _characters(prompt, text), spans))
    return found


def _truncate(prompt: Tokens, text: Tokens, length: int) -> tuple[Tokens, Tokens]:
    excess = len(prompt) + len(text) + SPECIAL_TOKENS - length
    sizes = sizes_to_keep([len(prompt), len(text)], excess, TruncationStrategy.LONGEST_FIRST)
    return tuple(each.cut(size) for each, size in zip((prompt, text), sizes, strict=True))


def _characters(prompt: Tokens, text: Tokens) -> list[tuple[int, int]]:
    """The characters of each token of a row, negative in the prompt: counted from one behind its last token."""
    behind = prompt.ends[-1] + 1 if len(prompt) else 0
    return [
        (0, 0),
        *((start - behind, end - behind) for start, end in zip(prompt.starts, prompt.ends, strict=True)),
        (0, 0),
        (0, 0),
        *zip(text.starts, text.ends, strict=True),
        (0, 0),
    ]


def _read(prompt: str, text: str, characters: list[tuple[int, int]], spans: list[Span]) -> Iterator[dict]:
    for span in spans:
        start, end = characters[span.first][0], characters[span.last][1]
        if end < 0:
            shift = len(prompt) + 1
            yield {"text": prompt[start + shift : end + shift], "probability": span.probability}
        elif start >= 0:
            yield {"text": text[start:end], "start": start, "end": end, "probability": span.probability}
