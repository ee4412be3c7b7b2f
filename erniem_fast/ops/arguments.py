"""The arguments of an op: as its declaration annotates them, and flattened for a custom op's schema."""

from collections.abc import Callable, Iterable
from itertools import islice
from types import NoneType
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from .choose import parameters

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.Size: "SymInt[]",
}


class Argument(NamedTuple):
    """One argument of an op.

    Attributes:
        name: the parameter's; for a field of a NamedTuple, the parameter's name, an underscore and the field's name.
        kind: a key of `_SCHEMA_TYPES`, or a NamedTuple.
        optional: whether the value may be None.
    """

    name: str
    kind: type
    optional: bool

    def leaves(self) -> list["Argument"]:
        """The arguments that this one is flattened to."""
        if self.kind in _SCHEMA_TYPES:
            return [self]
        fields = (_argument(f"{self.name}_{name}", hint) for name, hint in get_type_hints(self.kind).items())
        return [each._replace(optional=each.optional or self.optional) for each in fields]

    @property
    def schema(self) -> str:
        return f"{_SCHEMA_TYPES[self.kind]}{'?' if self.optional else ''} {self.name}"


def _argument(name: str, hint: object) -> Argument:
    kinds = [each for each in get_args(hint) if each is not NoneType]
    return Argument(name, kinds[0], optional=True) if kinds else Argument(name, hint, optional=False)


def declared(function: Callable) -> list[Argument]:
    """The arguments that a function's annotations declare."""
    hints = get_type_hints(function)
    return [_argument(name, hints[name]) for name in parameters(function)]


def schema_of(arguments: list[Argument], *rest: str, returns: int, first: str | None = None) -> str:
    """The schema of a custom op with these arguments, and with `first` before and `rest` after them."""
    inputs = [*([first] if first else []), *(leaf.schema for each in arguments for leaf in each.leaves()), *rest]
    outputs = ", ".join(["Tensor"] * returns)
    return f"({', '.join(inputs)}) -> {outputs if returns == 1 else f'({outputs})'}"


def flatten(arguments: list[Argument], values: Iterable[object]) -> list[object]:
    """The values as a custom op takes them; a NamedTuple that is None becomes as many None."""
    flat = []
    for argument, value in zip(arguments, values, strict=True):
        if argument.kind in _SCHEMA_TYPES:
            flat.append(value)
        elif value is None:
            flat.extend([None] * len(argument.kind._fields))
        else:
            flat.extend(value)
    return flat


def restore(arguments: list[Argument], flat: Iterable[object]) -> list[object]:
    """The inverse of `flatten`: the arguments' values, with their NamedTuples."""
    flat, values = iter(flat), []
    for _, kind, optional in arguments:
        if kind in _SCHEMA_TYPES:
            values.append(next(flat))
            continue
        fields = tuple(islice(flat, len(kind._fields)))
        absent = optional and all(each is None for each in fields)
        values.append(None if absent else kind._make(fields))
    return values


def by_name(arguments: list[Argument], values: Iterable[object]) -> dict[str, object]:
    """The values by the names of their arguments."""
    return {each.name: value for each, value in zip(arguments, values, strict=True)}
