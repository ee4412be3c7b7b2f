"""The environment flags: their names, values and defaults stand in one table and are read in one place.

Flags are read when a call is made, so that they can be toggled in a running process.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

PREFIX = "ERNIEM_FAST_"


@dataclass(frozen=True)
class Flag:
    """One environment flag; its default is the first of its values."""

    name: str
    values: tuple[str, ...]
    effect: str

    @property
    def default(self) -> str:
        return self.values[0]


KERNELS = Flag("ERNIEM_FAST_KERNELS", ("auto", "off"), "`off` runs every op in plain PyTorch")
PACKING = Flag("ERNIEM_FAST_PACKING", ("1", "0"), "`0` computes padded positions too, as transformers 4.57.6 did")
RECOMPUTE = Flag(
    "ERNIEM_FAST_RECOMPUTE",
    ("0", "1"),
    "`1` computes activations again in the backward: a `(tokens, intermediate_size)` tensor a layer less is kept",
)
VERIFY = Flag("ERNIEM_FAST_VERIFY", ("0", "1"), "`1` runs the reference beside every op and raises where they disagree")

_CHOICES = ("auto", "triton", "native", "torch", "reference")

# Keyed by the names that `use_kernels` and `ops` use.
OPS = {
    "embeddings": Flag(
        "ERNIEM_FAST_EMBEDDINGS",
        ("auto", "native", "triton", "torch", "reference"),
        "implementation of the embeddings; `native` is compiled where it is not built yet",
    ),
    "attention": Flag("ERNIEM_FAST_ATTENTION", _CHOICES, "implementation of attention"),
    "bias_gelu": Flag("ERNIEM_FAST_BIAS_GELU", _CHOICES, "implementation of bias-GELU-dropout"),
    "layernorm": Flag("ERNIEM_FAST_LAYERNORM", _CHOICES, "implementation of add-layernorm"),
}

FLAGS = {flag.name: flag for flag in (KERNELS, *OPS.values(), PACKING, RECOMPUTE, VERIFY)}

_overrides: ContextVar[Mapping[str, str]] = ContextVar("erniem_fast_overrides", default=MappingProxyType({}))

# What `while_held` keeps; None where the flags may change at any time.
_memo: ContextVar[dict[tuple, object] | None] = ContextVar("erniem_fast_memo", default=None)


def read(flag: Flag) -> str:
    """The value in force: that of the innermost `use_kernels`, else the environment's, else the default.

    Raises:
        ValueError: the environment holds a value that the flag does not take.
    """
    value = _overrides.get().get(flag.name)
    return value if value is not None else _valid(flag, os.environ.get(flag.name, flag.default), flag.name)


def check_names() -> None:
    """Refuses a misspelt flag, which would otherwise be ignored in silence.

    Raises:
        ValueError: the environment holds an `ERNIEM_FAST_*` variable that is no flag.
    """
    for name in os.environ:
        if name.startswith(PREFIX) and name not in FLAGS:
            raise ValueError(f"{name} is not a flag of erniem_fast; unset it. The flags are {', '.join(FLAGS)}.")


@contextmanager
def held() -> Iterator[None]:
    """Reads all flags once, for every call inside the `with` block.

    Raises:
        ValueError: the environment holds an unknown flag or value.
    """
    check_names()
    with _set(_overrides, {name: read(flag) for name, flag in FLAGS.items()}), _set(_memo, {}):
        yield


def while_held(function: Callable) -> Callable:
    """Calls a function that depends on its arguments and the flags alone once for as long as the flags are held."""

    @functools.wraps(function)
    def call(*args: object) -> object:
        memo = _memo.get()
        if memo is None:
            return function(*args)
        key = (function, args)
        if key not in memo:
            memo[key] = function(*args)
        return memo[key]

    return call


@contextmanager
def use_kernels(
    *,
    embeddings: str | None = None,
    attention: str | None = None,
    bias_gelu: str | None = None,
    layernorm: str | None = None,
) -> Iterator[None]:
    """Chooses implementations inside a `with` block; what is left out keeps its flag's value.

    Args:
        embeddings, attention, bias_gelu, layernorm: `auto` or the name of an implementation
            (`python -m erniem_fast status` lists them).

    Raises:
        ValueError: a value is not among those of the op's flag.
    """
    chosen = {"embeddings": embeddings, "attention": attention, "bias_gelu": bias_gelu, "layernorm": layernorm}
    values = {OPS[op].name: _valid(OPS[op], value, op) for op, value in chosen.items() if value is not None}
    with _set(_overrides, {**_overrides.get(), **values}), _set(_memo, None):
        yield


@contextmanager
def _set(variable: ContextVar, value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _valid(flag: Flag, value: str, source: str) -> str:
    if value not in flag.values:
        raise ValueError(f"{source}={value!r} is not a valid choice; use one of {', '.join(flag.values)}.")
    return value
