"""Extraction by schema: `extract`, and the Extractor behind it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..configuration import RESERVED_POSITIONS
from ..tokenization import ErnieMTokenizer
from . import compat as original
from . import windows
from .decoding import decode
from .schema import LANGUAGES, Node, half_width, parse
from .scoring import BATCH_TOKENS, LEAST_ROOM, SPECIAL_TOKENS, Row, Scorer
from .tokens import Tokens, tokenize


class Question(NamedTuple):
    """A prompt about a text, and the node of the schema that asks; compared by the first two."""

    prompt: str
    text: int
    node: Node

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt, self.text


class Extractor:
    """Finds in texts what a schema names.

    The schema, the prompts and the results are those of PaddleNLP's `Taskflow("information_extraction")`.

    Args:
        model: an `ErnieMForInformationExtraction`.
        tokenizer: its `ErnieMTokenizer`.
        schema: a name, a list of names and dictionaries, or a dictionary from names to schemas, nested to any depth.
            `"sentiment[positive,negative]"` is a classification by these options.
        lang: the language of the schema, `"zh"` or `"en"`; it chooses the prompts.
        threshold: a start and an end are taken where their probabilities are above it (`position_prob` in PaddleNLP).
        overlap: whether spans of one name may contain or overlap each other.
        max_length: the tokens of a row, prompt included; by default what the model takes, at most 512. Longer texts
            are cut at the ends of sentences, into windows that overlap.
        batch_tokens: the tokens of a batch. It changes speed and memory, and results by rounding only.
        progress: whether to show a bar; None for only where the standard error is a terminal.
        compat: whether to do all as PaddleNLP does it, known faults included.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it, its value and the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: ErnieMTokenizer,
        schema: str | Sequence | Mapping,
        *,
        lang: str = "zh",
        threshold: float = 0.5,
        overlap: bool = False,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        progress: bool | None = None,
        compat: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is no model; load it: ErnieMForInformationExtraction.from_pretrained(…).")
        if lang not in LANGUAGES:
            raise ValueError(f"lang={lang!r} is not a language of prompts; use one of {LANGUAGES}.")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold!r} is not a probability; use a number from 0 to less than 1.")
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens!r} is not a number of tokens; use a positive integer.")
        if compat and overlap:
            raise ValueError("overlap=True is nothing that compat=True has; leave one of them out.")
        self.model, self.tokenizer, self.lang, self.threshold = model, tokenizer, lang, threshold
        self.overlap, self.batch_tokens, self.progress, self.compat = overlap, batch_tokens, progress, compat
        self.max_length = _length_of_rows(model, max_length)
        self.set_schema(schema)

    def set_schema(self, schema: str | Sequence | Mapping) -> None:
        """Replaces the schema.

        Raises:
            TypeError, ValueError: the schema is malformed, or a name is too long for the model; the message says where.
        """
        nodes = parse(schema)
        all_nodes = _all_nodes(nodes)
        names = tokenize(self.tokenizer, [half_width(node.name) for node in all_nodes])
        for node, name in zip(all_nodes, names, strict=True):
            self._check_length(node, len(name))
        self.schema, self.nodes = schema, nodes

    def _check_length(self, node: Node, tokens: int) -> None:
        room = self._room(tokens)
        if room < LEAST_ROOM:
            raise ValueError(
                f"{node} is too long for a prompt: it leaves room for {max(room, 0)} of max_length={self.max_length} "
                f"tokens, and a text needs {LEAST_ROOM}; shorten the name, or split its options among several names."
            )

    def _room(self, prompt_tokens: int) -> int:
        return self.max_length - prompt_tokens - SPECIAL_TOKENS

    def __call__(self, texts: str | dict | Sequence[str | dict]) -> list[dict[str, list[dict[str, Any]]]]:
        """Extracts from one or more texts.

        Args:
            texts: a string, or a list of strings; in place of a string, a dictionary with a string as `"text"`.

        Returns:
            For each text, the spans of each name that was found: `text`, `start`, `end`, so that
            `text[start:end]` is the span's text, `probability`, and `relations` where there are any, by name again.
            Spans are in the order of their positions. A classification has the option as `text`, and no start and end.

        Raises:
            TypeError: a text is not a string; the message says which.
        """
        texts = _as_strings(texts)
        with Scorer(self.model, self.tokenizer, self.batch_tokens, self.progress) as scorer:
            if self.compat:
                return original.extract(self, scorer, texts)
            return self._extract(scorer, texts)

    def _extract(self, scorer: Scorer, texts: list[str]) -> list[dict]:
        """Level by level: all names at the top about all texts, then what relates to the spans that were found."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        tokenized = tokenize(self.tokenizer, list(numbers))
        known: dict[tuple[str, int], list[dict]] = {}
        results = [{} for _ in texts]
        level = [
            (Question(node.prompt(None, self.lang), numbers[text], node), result)
            for text, result in zip(texts, results, strict=True)
            for node in self.nodes
        ]
        while level:
            new = {question.key: question for question, _ in level if question.key not in known}
            known.update(self._answer(scorer, tokenized, list(new.values())))
            below = []
            for question, place in level:
                found = [dict(span) for span in known[question.key]]
                if not found:
                    continue
                place[question.node.name] = found
                below += [(question, span, child) for span in found for child in question.node.children]
            level = [
                (Question(child.prompt(span["text"], self.lang), question.text, child), _Relations(span))
                for question, span, child in below
            ]
        return results

    def _answer(
        self, scorer: Scorer, texts: list[Tokens], questions: list[Question]
    ) -> dict[tuple[str, int], list[dict]]:
        """The answers to questions, by their keys; windows of all questions are scored together."""
        prompts = list(dict.fromkeys(question.prompt for question in questions))
        prompts = dict(zip(prompts, tokenize(self.tokenizer, prompts), strict=True))
        asked = [question for question in questions if self._has_room(question, prompts[question.prompt])]
        cuts = [self._cut(texts[question.text], prompts[question.prompt]) for question in asked]
        rows = [
            Row(prompts[question.prompt].ids, texts[question.text].ids[window])
            for question, cut in zip(asked, cuts, strict=True)
            for window in cut
        ]
        places = [(number, index) for number, cut in enumerate(cuts) for index in range(len(cut))]
        scores = [[None] * len(cut) for cut in cuts]
        answers = {question.key: [] for question in questions}
        for row, probabilities in scorer.score(rows):
            number, index = places[row]
            options = asked[number].node.options()
            columns = rows[row].prompt_columns() if options else rows[row].text_columns()
            scores[number][index] = probabilities[:, columns].copy()
            if any(each is None for each in scores[number]):
                continue
            question, text = asked[number], texts[asked[number].text]
            if options:
                answers[question.key] = self._choose(options, prompts[question.prompt], scores[number])
            else:
                answers[question.key] = self._find(text, cuts[number], scores[number])
            scores[number] = ()
        return answers

    def _has_room(self, question: Question, prompt: Tokens) -> bool:
        if self._room(len(prompt.ids)) >= LEAST_ROOM:
            return True
        warnings.warn(
            f"{question.node} was not looked for in relation to a span, because the prompt {question.prompt[:60]!r}… "
            f"of {len(prompt.ids)} tokens is too long for max_length={self.max_length}.",
            stacklevel=5,
        )
        return False

    def _cut(self, text: Tokens, prompt: Tokens) -> list[slice]:
        if not text.ids:
            return []
        return windows.cut(len(text.ids), self._room(len(prompt.ids)), text.sentence_ends)

    def _find(self, text: Tokens, cut: list[slice], scores: list[np.ndarray]) -> list[dict]:
        """The spans of a text, from the scores of its windows, `(2, tokens)` each."""
        starts, ends = windows.merge(cut, scores)
        found = {}
        for span in decode(starts, ends, self.threshold, self.overlap):
            if windows.share_a_window(cut, span.first, span.last + 1):
                start, end = text.spans[span.first][0], text.spans[span.last][1]
                if end > start:
                    # Tokens of one character that normalisation expands share its place.
                    found[start, end] = max(span.probability, found.get((start, end), 0.0))
        return [
            {"text": text.text[start:end], "start": start, "end": end, "probability": round(probability, 6)}
            for (start, end), probability in sorted(found.items())
        ]

    def _choose(self, options: list[str], prompt: Tokens, scores: list[np.ndarray]) -> list[dict]:
        """The option that most windows choose, with its mean probability there; none if no window chooses."""
        places = _places(options, prompt.text)
        votes: dict[str, list[float]] = {}
        for starts, ends in scores:
            spans = decode(starts, ends, self.threshold)
            best = max(spans, key=lambda span: span.probability, default=None)
            if best is None:
                continue
            start, end = prompt.spans[best.first][0], prompt.spans[best.last][1]
            shared = {option: min(end, stop) - max(start, first) for option, (first, stop) in places.items()}
            option = max(shared, key=shared.get)
            if shared[option] > 0:
                votes.setdefault(option, []).append(best.probability)
        if not votes:
            return []
        option = max(votes, key=lambda option: (len(votes[option]), sum(votes[option])))
        return [{"text": option.strip(), "probability": round(sum(votes[option]) / len(votes[option]), 6)}]


class _Relations:
    """Sets the relations of a span, which are made when the first one is found."""

    def __init__(self, span: dict) -> None:
        self.span = span

    def __setitem__(self, name: str, found: list[dict]) -> None:
        self.span.setdefault("relations", {})[name] = found


def extract(
    model: nn.Module,
    tokenizer: ErnieMTokenizer,
    texts: str | dict | Sequence[str | dict],
    schema: str | Sequence | Mapping,
    **options: Any,
) -> list[dict[str, list[dict[str, Any]]]]:
    """Finds in texts what a schema names: `Extractor(model, tokenizer, schema, **options)(texts)`.

    Returns:
        For each text a dictionary from names to spans, as `Extractor` describes them.
    """
    return Extractor(model, tokenizer, schema, **options)(texts)


def _length_of_rows(model, max_length: int | None) -> int:
    most = min(512, model.config.max_position_embeddings - RESERVED_POSITIONS)
    if max_length is None:
        return most
    least = SPECIAL_TOKENS + LEAST_ROOM + 1
    if not isinstance(max_length, int) or not least <= max_length <= most:
        raise ValueError(f"max_length={max_length!r} is out of range; use {least} to {most} tokens, or leave it out.")
    return max_length


def _all_nodes(nodes: list[Node]) -> list[Node]:
    found = list(nodes)
    for node in found:
        found += node.children
    return found


def _places(options: list[str], prompt: str) -> dict[str, tuple[int, int]]:
    """Where each option stands in a prompt, which ends in them."""
    places, start = {}, prompt.rindex("[" + ",".join(options)) + 1
    for option in options:
        places[option] = (start, start + len(option))
        start += len(option) + 1
    return places


def _as_strings(texts) -> list[str]:
    if isinstance(texts, (str, dict)):
        texts = [texts]
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"texts is of type {type(texts).__name__}; give a string or a list of strings.")
    strings = [each.get("text") if isinstance(each, dict) else each for each in texts]
    for index, text in enumerate(strings):
        if not isinstance(text, str):
            raise TypeError(
                f"texts[{index}] is {texts[index]!r:.80}; it must be a string, or a dictionary with a string as 'text'."
            )
    return strings
