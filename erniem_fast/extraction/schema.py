"""Schemas: what to look for, as a tree of names, and the prompts that ask a model for them."""

import re
from dataclasses import dataclass, field

LANGUAGES = ("zh", "en")

# Full-width forms and the ideographic space, as the original replaces them in prompts.
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
OPTIONS = re.compile(r"\[[^\[\]]*\]\Z")


@dataclass
class Node:
    """A name of a schema.

    Args:
        name: the name as the schema has it; it is the key in results.
        path: the names from the root to this one, for messages.
        children: what to look for in relation to each span of this name.
    """

    name: str
    path: tuple[str, ...]
    children: list["Node"] = field(default_factory=list)

    def options(self) -> list[str]:
        """The options of a classification, `["positive", "negative"]` of `"sentiment[positive,negative]"`; or none."""
        found = OPTIONS.search(half_width(self.name))
        return found.group()[1:-1].split(",") if found else []

    def prompt(self, subject: str | None, lang: str) -> str:
        """What the model is asked, about a span `subject` of the parent node, or about the whole text if None."""
        name = half_width(self.name)
        return name if subject is None else relation_prompt(name, half_width(subject), lang)

    def __str__(self) -> str:
        return "schema" + "".join(f"[{name!r}]" for name in self.path)


def relation_prompt(name: str, subject: str, lang: str) -> str:
    """What the model is asked for `name` of `subject`."""
    if lang == "zh":
        return f"{subject}的{name}"
    options = OPTIONS.search(name)
    if options is None:
        return f"{name} of {subject}"
    return f"{name[: options.start()].strip()} of {subject} {options.group()}"


def half_width(text: str) -> str:
    return text.translate(HALF_WIDTH)


def parse(schema) -> list[Node]:
    """The nodes at the top of a schema.

    Args:
        schema: a name; a list of names and of dictionaries; or a dictionary from names to schemas of what relates to
            them. `None`, `[]`, `{}` and `""` as a value of a dictionary stand for nothing.

    Raises:
        TypeError: something in it is neither a string, a list nor a dictionary; the message says where.
        ValueError: the schema is empty or contains itself, a name is blank, or options are.
    """
    try:
        nodes = _parse(schema, ())
    except RecursionError:
        raise ValueError("schema contains itself, or is nested too deep to be read; make it a tree.") from None
    if not nodes:
        raise ValueError(f"schema={schema!r} names nothing to extract; give a name, a list or a dictionary of names.")
    return nodes


def _parse(schema, path: tuple[str, ...]) -> list[Node]:
    if isinstance(schema, dict):
        items = list(schema.items())
    elif isinstance(schema, (list, tuple)):
        items = [item for each in schema for item in (each.items() if isinstance(each, dict) else [(each, None)])]
    else:
        items = [(schema, None)]
    nodes: dict[str, Node] = {}
    for name, below in items:
        _check_name(name, path)
        node = nodes.setdefault(name, Node(name, (*path, name)))
        if below:
            node.children = _merge(node.children, _parse(below, node.path))
    return list(nodes.values())


def _merge(nodes: list[Node], others: list[Node]) -> list[Node]:
    """The union of two lists of siblings: a name that a schema repeats is one node."""
    merged = {node.name: node for node in nodes}
    for other in others:
        node = merged.setdefault(other.name, other)
        if node is not other:
            node.children = _merge(node.children, other.children)
    return list(merged.values())


def _check_name(name, path: tuple[str, ...]) -> None:
    where = "schema" + "".join(f"[{each!r}]" for each in path)
    if not isinstance(name, str):
        raise TypeError(
            f"{where} holds {name!r}, of type {type(name).__name__}; a schema consists of names (str), lists of names, "
            f"and dictionaries from names to schemas."
        )
    text = half_width(name)
    if not text.strip():
        raise ValueError(f"{where} holds the blank name {name!r}; remove it, or say what to extract.")
    found = OPTIONS.search(text)
    if found is None:
        return
    options = [option.strip() for option in found.group()[1:-1].split(",")]
    if not all(options) or found.start() == 0 or len(set(options)) < len(options):
        raise ValueError(
            f"{where} holds {name!r}; write a classification as a name and distinct options that are not blank, "
            f"for example 'sentiment[positive,negative]'."
        )
