"""Reads what annotators export: doccano's jsonl and Label Studio's JSON."""

import json
import os

from .examples import AnnotatedText, Entity, Relation


def read_doccano(path: str | os.PathLike) -> list[AnnotatedText]:
    """Reads doccano's jsonl: a line has `text`, and `entities` with `relations`, or a list `label` of options.

    Raises:
        ValueError: a line is none of these, or an entity is outside its text; the message has file and line.
    """
    texts = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                texts.append(_read(f"{path}, line {number}", _from_doccano, lambda line=line: json.loads(line)))
    return texts


def read_label_studio(path: str | os.PathLike) -> list[AnnotatedText]:
    """Reads Label Studio's JSON: a list of tasks with `data.text` and, of their first annotation, the `result`.

    Raises:
        ValueError: the file is not a list of tasks, or a task is malformed, or the `text` of an entity is not at its
            place; the message has file and task.
    """
    with open(path, encoding="utf-8") as file:
        try:
            tasks = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); export the project as JSON, in UTF-8.") from error
    if not isinstance(tasks, list):
        raise ValueError(
            f"{path} holds data of type {type(tasks).__name__}; export the project as JSON, a list of tasks."
        )
    return [
        _read(f"{path}, task {number}", _from_label_studio, lambda task=task: task) for number, task in enumerate(tasks)
    ]


def _read(place: str, convert, load) -> AnnotatedText:
    try:
        text = convert(load())
        _check_strings(text.text, *text.choices, *(each.label for each in (*text.entities, *text.relations)))
        for start, end, label in text.entities:
            if not 0 <= start < end <= len(text.text):
                raise ValueError(f"the entity {label!r} at [{start}:{end}] is outside of a text of {len(text.text)}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{place}: {error!r}; correct the annotation, or export it again.") from error
    return text


def _check_strings(*values: object) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is of type {type(value).__name__} where a text, an option or a label is wanted")


def _from_doccano(item: dict) -> AnnotatedText:
    if "entities" not in item:
        options = item.get("label", [])
        if not isinstance(options, list):
            raise TypeError(f"'label' is {options!r}, not a list of options")
        return AnnotatedText(item["text"], choices=tuple(options))
    entities = item["entities"]
    numbers = {entity["id"]: number for number, entity in enumerate(entities)}
    return AnnotatedText(
        item["text"],
        tuple(Entity(each["start_offset"], each["end_offset"], each["label"]) for each in entities),
        tuple(
            Relation(numbers[each["from_id"]], numbers[each["to_id"]], each["type"])
            for each in item.get("relations", ())
        ),
    )


def _from_label_studio(task: dict) -> AnnotatedText:
    result = task["annotations"][0]["result"] if task.get("annotations") else []
    spans = [each for each in result if each["type"] == "labels"]
    numbers = {each["id"]: number for number, each in enumerate(spans)}
    text = task["data"]["text"]
    return AnnotatedText(
        text,
        tuple(Entity(*_place(text, each["value"]), each["value"]["labels"][0]) for each in spans),
        tuple(
            Relation(numbers[each["from_id"]], numbers[each["to_id"]], each["labels"][0])
            for each in result
            if each["type"] == "relation"
        ),
        tuple(choice for each in result if each["type"] == "choices" for choice in each["value"]["choices"]),
    )


def _place(text: str, value: dict) -> tuple[int, int]:
    """Where an entity begins and ends, in characters. Label Studio counts UTF-16 units: an emoji is two."""
    start, end, wanted = value["start"], value["end"], value.get("text")
    if wanted is None or _same(text[start:end], wanted):
        return start, end
    units = text.encode("utf-16-le", "surrogatepass")
    before, inside = (
        units[2 * first : 2 * last].decode("utf-16-le", "surrogatepass") for first, last in ((0, start), (start, end))
    )
    if not _same(inside, wanted):
        raise ValueError(f"{wanted!r} is not at [{start}:{end}], but {text[start:end]!r}")
    return len(before), len(before) + len(inside)


def _same(found: str, exported: str) -> bool:
    r"""Whether a part of a text is an entity's `text`, in which Label Studio writes the end of a line as \n."""
    return found.replace("\n", "\\n") == exported.replace("\n", "\\n")
