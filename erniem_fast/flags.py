"""The environment flags: their names, values and defaults stand in one table and are read in one place.

Flags are read when a call is made, so that they can be toggled in a running process.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

PREFIX = "ERNIEM_FAST_"


@dataclass(frozen=True)
class Flag:
    """One environment flag.

    Attributes:
        name: the environment variable.
        choices: its values, the default first.
        effect: what it does, for the README and for `status`.
        implementations: those of an op, by name, which are values of its flag too; `Op` fills this table.
    """

    name: str
    choices: tuple[str, ...]
    effect: str
    implementations: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def values(self) -> tuple[str, ...]:
        return (*self.choices, *self.implementations)

    @property
    def default(self) -> str:
        return self.choices[0]


KERNELS = Flag("ERNIEM_FAST_KERNELS", ("auto", "off"), "`off` runs every op in plain PyTorch")
PACKING = Flag("ERNIEM_FAST_PACKING", ("1", "0"), "`0` computes padded positions too, as transformers 4.57.6 did")
RECOMPUTE = Flag(
    "ERNIEM_FAST_RECOMPUTE",
    ("0", "1"),
    "`1` computes activations again in the backward: a `(tokens, intermediate_size)` tensor a layer less is kept",
)
VERIFY = Flag("ERNIEM_FAST_VERIFY", ("0", "1"), "`1` runs the reference beside every op and raises where they disagree")

# By the ops' names.
OPS = {
    "embeddings": Flag(
        "ERNIEM_FAST_EMBEDDINGS",
        ("auto",),
        "implementation of the embeddings; `native` is compiled where it is not built yet",
    ),
    "attention": Flag("ERNIEM_FAST_ATTENTION", ("auto",), "implementation of attention"),
    "bias_gelu": Flag("ERNIEM_FAST_BIAS_GELU", ("auto",), "implementation of bias-GELU-dropout"),
    "add_norm": Flag("ERNIEM_FAST_LAYERNORM", ("auto",), "implementation of add-layernorm"),
}

FLAGS = {flag.name: flag for flag in (KERNELS, *OPS.values(), PACKING, RECOMPUTE, VERIFY)}


@dataclass(frozen=True)
class Settings:
    """Values of flags that win over the environment's.

    Attributes:
        values: by the flags' names.
        memo: what `while_held` keeps; None where other flags are read from the environment, which may change.
    """

    values: dict[str, str]
    memo: dict[tuple, object] | None = None


_NONE = Settings({})
_settings: ContextVar[Settings] = ContextVar("erniem_fast_settings", default=_NONE)


def read(flag: Flag) -> str:
    """The value in force: that of the innermost `use_kernels`, else the environment's, else the default.

    Raises:
        ValueError: the environment holds a value that the flag does not take.
    """
    value = _settings.get().values.get(flag.name)
    return value if value is not None else _valid(flag, os.environ.get(flag.name, flag.default), flag.name)


def check_names() -> None:
    """Refuses a misspelt flag, which would otherwise be ignored in silence.

    Raises:
        ValueError: the environment holds an `ERNIEM_FAST_*` variable that is no flag.
    """
    for name in os.environ:
        if name.startswith(PREFIX) and name not in FLAGS:
            raise ValueError(f"{name} is not a flag of erniem_fast; unset it. The flags are {', '.join(FLAGS)}.")


def snapshot() -> Settings | None:
    """All flags as they are now, for `held`; None inside a graph, where they are constants.

    Raises:
        ValueError: the environment holds an unknown value.
    """
    if torch.compiler.is_compiling():
        return None
    settings = _settings.get()
    return settings if settings.memo is not None else Settings({name: read(flag) for name, flag in FLAGS.items()}, {})


def held(settings: Settings | None = None) -> AbstractContextManager[None]:
    """Keeps all flags as they are for every call inside the `with` block, or as they were at a `snapshot`.

    Raises:
        ValueError: there is no snapshot, and the environment holds an unknown flag or value.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if settings is None:
        check_names()
        settings = snapshot()
    return _set(settings)


def while_held(function: Callable) -> Callable:
    """Calls a function that depends on its arguments and the flags alone once for as long as the flags are held."""

    @functools.wraps(function)
    def call(*args: object) -> object:
        memo = _settings.get().memo
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
    with use_implementations(embeddings=embeddings, attention=attention, bias_gelu=bias_gelu, add_norm=layernorm):
        yield


@contextmanager
def use_implementations(**by_op: str | None) -> Iterator[None]:
    """`use_kernels` by the names of `OPS`."""
    chosen = {OPS[op]: value for op, value in by_op.items() if value is not None}
    values = {flag.name: _valid(flag, value, flag.name.removeprefix(PREFIX).lower()) for flag, value in chosen.items()}
    with _set(Settings({**_settings.get().values, **values})):
        yield


@contextmanager
def _set(settings: Settings) -> Iterator[None]:
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def _valid(flag: Flag, value: str, source: str) -> str:
    if value not in flag.values:
        raise ValueError(f"{source}={value!r} is not a valid choice; use one of {', '.join(flag.values)}.")
    return value
