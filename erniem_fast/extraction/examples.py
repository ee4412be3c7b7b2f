"""Examples to train on, a prompt and a text with its answers each; from annotated texts, with negative examples."""

import itertools
import json
import operator
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from .schema import LANGUAGES, half_width, relation_prompt


class Answer(NamedTuple):
    """A span of the text; or of the prompt, then `start` and `end` are negative, counted from one behind its end."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """A prompt about a text, and the answers; a negative example has none."""

    content: str
    prompt: str
    result_list: tuple[Answer, ...] = ()


class Entity(NamedTuple):
    start: int
    end: int
    label: str


class Relation(NamedTuple):
    """A relation of one entity of a text to another, both by their numbers."""

    subject: int
    object: int
    label: str


@dataclass(frozen=True)
class AnnotatedText:
    """A text with its entities, the relations between them, and the options that it was given as a whole."""

    text: str
    entities: tuple[Entity, ...] = ()
    relations: tuple[Relation, ...] = ()
    choices: tuple[str, ...] = field(default=())


def read_examples(path: str | os.PathLike) -> list[Example]:
    """Reads PaddleNLP's jsonl: a line has `content`, `prompt` and `result_list` of `text`, `start` and `end`.

    Raises:
        ValueError: a line is none of these, or an answer is not where it says; the message has file and line.
    """
    examples = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                answers = tuple(Answer(each["text"], each["start"], each["end"]) for each in item["result_list"])
                examples.append(Example(item["content"], item["prompt"], answers))
                _check(examples[-1])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r}; a line needs content, prompt, and result_list with text, start "
                    f"and end, such that content[start:end] is the text."
                ) from error
    return examples


def write_examples(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Writes what `read_examples` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            item = asdict(example) | {"result_list": [answer._asdict() for answer in example.result_list]}
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def _check(example: Example) -> None:
    for name in ("content", "prompt"):
        if not isinstance(getattr(example, name), str):
            raise TypeError(f"{name} is {getattr(example, name)!r}, not a string")
    for text, start, end in example.result_list:
        source, shift = (example.prompt, len(example.prompt) + 1) if end < 0 else (example.content, 0)
        if not text or start + shift < 0 or source[start + shift : end + shift] != text:
            raise ValueError(f"{text!r} is not at [{start}:{end}] of {source[:40]!r}")


def make_examples(
    texts: Sequence[AnnotatedText],
    *,
    lang: str = "zh",
    choices_prompt: str | None = None,
    options: Sequence[str] = (),
    negative_ratio: int = 5,
    seed: int = 0,
) -> list[Example]:
    """Makes examples from annotated texts, as PaddleNLP's conversion does.

    An entity whose label is `"label##option"` is classified too, with a prompt about it.

    Args:
        texts: the annotated texts.
        lang: the language of the prompts, `"zh"` or `"en"`.
        choices_prompt: the name of the classification that `options` belong to, for example `"情感倾向"`.
        options: all options of it.
        negative_ratio: the most negative examples for each positive one of a text: labels that the text does not have;
            relations to a wrong subject, of a wrong kind, and from the object back. 0 for none.
        seed: of the choice of negatives.

    Raises:
        ValueError: `lang` is unknown, or a text has an option that is not in `options`.
    """
    if lang not in LANGUAGES:
        raise ValueError(f"lang={lang!r} is not a language of prompts; use one of {LANGUAGES}.")
    draw = random.Random(operator.index(seed))
    labels = sorted({entity.label.split("##")[0] for text in texts for entity in text.entities})
    kinds = sorted({relation.label for text in texts for relation in text.relations})
    examples = []
    for text in texts:
        for positive, absent in (
            (_entities(text), labels),
            (_relations(text, lang), _wrong_relations(text, kinds, lang)),
        ):
            examples += positive
            absent = [prompt for prompt in absent if prompt not in {example.prompt for example in positive}]
            most = negative_ratio * max(len(positive), 1)
            chosen = absent if len(absent) <= most else draw.sample(absent, most)
            examples += [Example(text.text, prompt) for prompt in chosen]
        examples += _choices(text, lang, choices_prompt, options)
    return examples


def _grouped(text: AnnotatedText, found: Iterable[tuple[str, Entity]]) -> list[Example]:
    """An example for each prompt, with all its answers by position."""
    answers: dict[str, set[Answer]] = {}
    for prompt, (start, end, _) in found:
        answers.setdefault(half_width(prompt), set()).add(Answer(text.text[start:end], start, end))
    return [
        Example(text.text, prompt, tuple(sorted(mine, key=lambda answer: answer[1:])))
        for prompt, mine in answers.items()
    ]


def _entities(text: AnnotatedText) -> list[Example]:
    return _grouped(text, ((entity.label.split("##")[0], entity) for entity in text.entities))


def _name(text: AnnotatedText, number: int) -> str:
    return text.text[text.entities[number].start : text.entities[number].end]


def _relations(text: AnnotatedText, lang: str) -> list[Example]:
    return _grouped(
        text,
        (
            (relation_prompt(each.label, _name(text, each.subject), lang), text.entities[each.object])
            for each in text.relations
        ),
    )


def _wrong_relations(text: AnnotatedText, kinds: Sequence[str], lang: str) -> list[str]:
    """Prompts for what no relation of the text answers: every kind of every entity, objects included."""
    if not text.relations:
        return []
    names = sorted({_name(text, number) for number in range(len(text.entities))})
    return [half_width(relation_prompt(kind, name, lang)) for kind, name in itertools.product(kinds, names)]


def _choices(text: AnnotatedText, lang: str, name: str | None, options: Sequence[str]) -> list[Example]:
    given = [(None, choice) for choice in text.choices]
    for start, end, label in text.entities:
        if "##" in label:
            given.append((text.text[start:end], label.split("##")[1]))
    if given and (name is None or not set(options) >= {choice for _, choice in given}):
        raise ValueError(
            f"options={list(options)!r} with choices_prompt={name!r} does not have {sorted({c for _, c in given})}, "
            f"which {text.text[:40]!r} was given; name the classification and list all its options."
        )
    examples = []
    for subject, choice in given:
        prompt = f"{name}[{','.join(options)}]"
        prompt = half_width(prompt if subject is None else relation_prompt(prompt, subject, lang))
        start = prompt.rindex("[") + 1 + sum(len(each) + 1 for each in options[: list(options).index(choice)])
        place = start - len(prompt) - 1
        answer = Answer(prompt[start : start + len(choice)], place, place + len(choice))
        examples.append(Example(text.text, prompt, (answer,)))
    return examples
