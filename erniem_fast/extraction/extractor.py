"""Extraction by schema: `extract`, and the Extractor behind it."""

import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..configuration import RESERVED_POSITIONS
from ..inputs import as_integer
from ..tokenization import ErnieMTokenizer
from . import compat as original
from . import windows
from .decoding import above, decode, pair
from .schema import LANGUAGES, Node, half_width, parse
from .scoring import LEAST_ROOM, SPECIAL_TOKENS, Row, Scorer, tokens_of_batch, warn_if_untrained
from .tokens import Tokens, tokenize

Key = tuple[str, int, bool]


class Question(NamedTuple):
    """A prompt about a text, and the node of the schema that asks."""

    prompt: str
    text: int
    node: Node

    @property
    def key(self) -> Key:
        """What the answer depends on. A span may end in brackets, so that its prompt looks like a classification's."""
        return self.prompt, self.text, bool(self.node.options())


class Extractor:
    """Finds in texts what a schema names.

    The schema, the prompts and the results are those of PaddleNLP's `Taskflow("information_extraction")`.

    A call sets the model to eval, and what was in training back to it at its end. So before several threads extract
    with one model, call `model.eval()`: otherwise the first to finish would turn dropout on for the others.

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
        split_sentence: whether each sentence is looked at alone, as by PaddleNLP's option of this name.
        batch_tokens: the tokens of a batch; by default 2,048 on a CPU and 8,192 elsewhere. It changes speed and memory,
            and results by rounding only.
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
        split_sentence: bool = False,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        compat: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is no model; load it: ErnieMForInformationExtraction.from_pretrained(…).")
        if lang not in LANGUAGES:
            raise ValueError(f"lang={lang!r} is not a language of prompts; use one of {LANGUAGES}.")
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold!r} is not a probability; use a number from 0 to less than 1.")
        if compat and overlap:
            raise ValueError("overlap=True is nothing that compat=True has; leave one of them out.")
        self.model, self.tokenizer, self.lang, self.threshold = model, tokenizer, lang, threshold
        self.overlap, self.split_sentence, self.progress, self.compat = overlap, split_sentence, progress, compat
        self.batch_tokens = tokens_of_batch(model, batch_tokens)
        self.max_length = _length_of_rows(model, max_length)
        warn_if_untrained(model, "fine-tune it by examples/finetune_extraction.py, or load a UIE-M checkpoint")
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
        known: dict[Key, list[dict]] = {}
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

    def _answer(self, scorer: Scorer, texts: list[Tokens], questions: list[Question]) -> dict[Key, list[dict]]:
        """The answers to questions, by their keys; windows of all questions are scored together."""
        prompts = list(dict.fromkeys(question.prompt for question in questions))
        prompts = dict(zip(prompts, tokenize(self.tokenizer, prompts), strict=True))
        asked = [question for question in questions if self._has_room(question, prompts[question.prompt])]
        cuts = [self._cut(texts[question.text], prompts[question.prompt]) for question in asked]
        rows = [
            Row(prompts[question.prompt].ids, memoryview(texts[question.text].ids)[window])
            for question, cut in zip(asked, cuts, strict=True)
            for window in cut
        ]
        places = [(number, index) for number, cut in enumerate(cuts) for index in range(len(cut))]
        # Of each window only what is above the threshold is kept, so that the scores of long texts take no memory.
        read = [[None] * len(cut) for cut in cuts]
        for row, probabilities in scorer.score(rows):
            number, index = places[row]
            if options := asked[number].node.options():
                columns, prompt = rows[row].prompt_columns(), prompts[asked[number].prompt]
                read[number][index] = self._choose(options, prompt, probabilities[:, columns])
            else:
                read[number][index] = self._mark(cuts[number], index, probabilities[:, rows[row].text_columns()])
        answers = {question.key: [] for question in questions}
        for question, cut, mine in zip(asked, cuts, read, strict=True):
            is_choice = bool(question.node.options())
            answers[question.key] = _vote(mine) if is_choice else self._find(texts[question.text], cut, mine)
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
        cut = windows.cut_sentences if self.split_sentence else windows.cut
        return cut(len(text.ids), self._room(len(prompt.ids)), text.sentence_ends)

    def _mark(self, cut: list[slice], index: int, probabilities: np.ndarray) -> list[dict[int, float]]:
        """The starts and the ends in a window of a text, by the text's tokens; see `above`."""
        first, own = cut[index].start, windows.own_tokens(cut, index)
        return [
            {
                token + first: value
                for token, value in above(side, self.threshold).items()
                if own.start <= token + first < own.stop
            }
            for side in probabilities
        ]

    def _find(self, text: Tokens, cut: list[slice], marks: list[list[dict[int, float]]]) -> list[dict]:
        """The spans of a text, from the marks of its windows."""
        found = {}
        for part in windows.connected(cut):
            starts, ends = (dict(mark for each in marks[part] for mark in each[side].items()) for side in range(2))
            for span in pair(starts, ends, self.overlap):
                start, end = text.starts[span.first], text.ends[span.last]
                if end > start and windows.share_a_window(cut, span.first, span.last + 1):
                    # Tokens of one character that normalisation expands share its place.
                    found[start, end] = max(span.probability, found.get((start, end), 0.0))
        return [
            {"text": text.text[start:end], "start": start, "end": end, "probability": round(probability, 6)}
            for (start, end), probability in sorted(found.items())
        ]

    def _choose(self, options: list[str], prompt: Tokens, probabilities: np.ndarray) -> tuple[str, float] | None:
        """The option that a window chooses, and its probability."""
        best = max(decode(*probabilities, self.threshold), key=lambda span: span.probability, default=None)
        if best is None:
            return None
        start, end = prompt.starts[best.first], prompt.ends[best.last]
        places = _places(options, prompt.text)
        shared = {option: min(end, stop) - max(start, first) for option, (first, stop) in places.items()}
        option = max(shared, key=shared.get)
        return (option, best.probability) if shared[option] > 0 else None


def _vote(choices: list[tuple[str, float] | None]) -> list[dict]:
    """The option that most windows choose, with its mean probability there; none if no window chooses."""
    votes: dict[str, list[float]] = {}
    for option, probability in filter(None, choices):
        votes.setdefault(option, []).append(probability)
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
    return as_integer("max_length", max_length, least, most, ", or left out")


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
