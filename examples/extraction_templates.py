"""A small annotated set, made from templates: people, companies, cities and dates, and who works where."""

import random
import re

from erniem_fast.extraction import AnnotatedText, Entity, Relation

VALUES = {
    "person": ["Ann", "Peter", "Maria", "John", "Susan", "Paul", "Laura", "Martin", "Clara", "Simon", "Nina", "Victor"],
    "company": ["Acme", "Globex", "Initech", "Umbrella", "Stark Group", "Wayne Media", "Hooli", "Vandelay", "Soylent"],
    "city": ["Berlin", "London", "Paris", "Madrid", "Rome", "Oslo", "Vienna", "Prague", "Lisbon", "New York"],
    "date": ["Monday", "1 May", "12 June 2021", "Friday", "3 March", "30 July 2019", "Sunday", "8 October"],
}
# Clauses in any order, so that a model learns what words mean, not where they stand.
CLAUSES = [
    *(
        "{person}",
        "{person} works",
        "a letter from {person}",
        "the director {person}",
        "we met {person}",
        "and {person}",
    ),
    *("{company}", "for {company}", "an office of {company}", "{company} opened", "with {company}", "joined {company}"),
    *("{city}", "in {city}", "from {city}", "to {city}", "the office in {city}", "{city}:", "lives in {city}"),
    *("{date}", "on {date}", "since {date}", "until {date}", "closed on {date}", "it was {date}"),
    *("who left", "the meeting is", "and then", "has been closed", "will open", "no news", ",", "."),
]
TEMPLATES = [" ".join(_draw.sample(CLAUSES, _draw.randint(2, 6))) for _draw in map(random.Random, range(400))]
# Nothing is trained on these.
HELD_OUT = [
    "{person} has worked in {city} for {company} since {date}.",
    "The office in {city} will open on {date}.",
    "{company} and {person} met on {date}.",
]
SCHEMA = [{"person": ["company"]}, "company", "city", "date"]


def make_texts(templates: list[str], count: int, seed: int) -> list[AnnotatedText]:
    draw = random.Random(seed)
    return [_fill(draw, draw.choice(templates)) for _ in range(count)]


def _fill(draw: random.Random, template: str) -> AnnotatedText:
    text, entities = "", []
    for part in re.split(r"(\{\w+\})", template):
        if part.startswith("{"):
            label = part[1:-1]
            value = draw.choice(VALUES[label])
            entities.append(Entity(len(text), len(text) + len(value), label))
            text += value
        else:
            text += part
    numbers = {entity.label: number for number, entity in enumerate(entities)}
    relations = ()
    if {"person", "company"} <= numbers.keys() and len(numbers) == len(entities):
        relations = (Relation(numbers["person"], numbers["company"], "company"),)
    return AnnotatedText(text, tuple(entities), relations)


def to_result(text: AnnotatedText) -> dict:
    """What `extract` with SCHEMA should find."""
    found: dict[str, list[dict]] = {}
    spans = [{"text": text.text[start:end], "start": start, "end": end} for start, end, _ in text.entities]
    for relation in text.relations:
        related = dict(spans[relation.object])
        spans[relation.subject].setdefault("relations", {}).setdefault(relation.label, []).append(related)
    for span, (_, _, label) in zip(spans, text.entities, strict=True):
        found.setdefault(label, []).append(span)
    return found
