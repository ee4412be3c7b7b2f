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
TEMPLATES = [
    "{person} works for {company} in {city}.",
    "On {date}, {person} joined {company}.",
    "{company} opened an office in {city} on {date}.",
    "The new director of {company} is {person}, who lives in {city}.",
    "{person} left {city} on {date}.",
    "Since {date} the office of {company} has been closed.",
    "We met {person} in {city}; the meeting with {company} is on {date}.",
    "{city}: {company} names {person} as its director.",
]
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
    if {"person", "company"} <= numbers.keys():
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
