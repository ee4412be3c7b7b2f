"""The environment flags: one table of their names, values and defaults, and one place that reads them.

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
_ENCODED_PREFIX = os.environ.encodekey(PREFIX)


@dataclass(frozen=True)
class Flag:
    """One environment flag.

    Attributes:
        name: of the environment variable.
        choices: the values that it takes; the first is the default.
        effect: a description for users, in Markdown.
        implementations: those of an op, by name, which its flag takes too; `Op` fills this table.
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
    "`1` recomputes activations in the backward, which saves a `(tokens, intermediate_size)` tensor per layer",
)
VERIFY = Flag(
    "ERNIEM_FAST_VERIFY", ("0", "1"), "`1` runs the reference beside every op and raises an error if they disagree"
)

# The flag of each op, by the op's name.
OPS = {
    "embeddings": Flag(
        "ERNIEM_FAST_EMBEDDINGS",
        ("auto",),
        "implementation of the embeddings; `native`, here and in the next three, is compiled if it is not built",
    ),
    "attention": Flag("ERNIEM_FAST_ATTENTION", ("auto",), "implementation of attention"),
    "bias_gelu": Flag("ERNIEM_FAST_BIAS_GELU", ("auto",), "implementation of bias-GELU-dropout"),
    "add_norm": Flag("ERNIEM_FAST_LAYERNORM", ("auto",), "implementation of add-layernorm"),
}

FLAGS = {flag.name: flag for flag in (KERNELS, *OPS.values(), PACKING, RECOMPUTE, VERIFY)}
_DEFAULTS = {name: flag.default for name, flag in FLAGS.items()}


@dataclass(frozen=True)
class Settings:
    """Values of flags that take precedence over the environment's.

    Attributes:
        values: by the flags' names.
        memo: the results that `while_held` keeps while all flags are held; None if some flags are read from the
            environment, which may change.
    """

    values: dict[str, str]
    memo: dict[tuple, object] | None = None


_NONE = Settings({})
_settings: ContextVar[Settings] = ContextVar("erniem_fast_settings", default=_NONE)


def read(flag: Flag) -> str:
    """The flag's current value: that of the innermost `use_kernels`, else the environment's, else the default.

    Raises:
        ValueError: the environment holds a value that the flag does not take.
    """
    value = _settings.get().values.get(flag.name)
    return value if value is not None else _valid(flag, os.environ.get(flag.name, flag.default), flag.name)


def check_names() -> None:
    """Refuses misspelt flags, which would otherwise be ignored silently.

    Raises:
        ValueError: the environment holds an `ERNIEM_FAST_*` variable that is not a flag.
    """
    for name in _present():
        if name not in FLAGS:
            raise ValueError(f"{name} is not a flag of erniem_fast; unset it. The flags are {', '.join(FLAGS)}.")


def check() -> None:
    """Refuses misspelt flags, and values that flags do not take.

    Raises:
        ValueError: the environment holds one.
    """
    check_names()
    snapshot()


def _present() -> list[str]:
    """The names of the environment's variables that start with the prefix.

    `os.environ` would decode the names of all variables, in every forward.
    """
    return [os.environ.decodekey(key) for key in os.environ._data if key.startswith(_ENCODED_PREFIX)]


def snapshot() -> Settings | None:
    """All flags as they are now, for `held`; None while torch.compile makes a graph, where they are constants.

    Raises:
        ValueError: the environment holds an unknown value.
    """
    if torch.compiler.is_compiling():
        return None
    settings = _settings.get()
    if settings.memo is not None:
        return settings
    values = {**_DEFAULTS, **settings.values}
    if _present():
        values = {name: read(flag) for name, flag in FLAGS.items()}
    return Settings(values, {})


def held(settings: Settings | None = None) -> AbstractContextManager[None]:
    """Keeps all flags constant inside a `with` block.

    Args:
        settings: the flags' values, from `snapshot`; None for the current values.

    Raises:
        ValueError: `settings` is None, and the environment holds an unknown flag or value.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if settings is None:
        check_names()
        settings = snapshot()
    return _set(settings)


def while_held(function: Callable) -> Callable:
    """Remembers the results of a function while the flags are held; they may depend on arguments and flags only.

    The arguments are kept meanwhile: no tensors, which would outlive their use.
    """

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
    """Chooses the ops' implementations inside a `with` block.

    Args:
        embeddings, attention, …: for each op `auto` or the name of an implementation (`python -m erniem_fast status`
            lists them); None keeps the flag's value.

    Raises:
        ValueError: the op's flag does not take the value.
    """
    with use_implementations(
        embeddings=embeddings,
        attention=attention,
        bias_gelu=bias_gelu,
        add_norm=layernorm,
    ):
        yield


@contextmanager
def use_implementations(**by_op: str | None) -> Iterator[None]:
    """`use_kernels`, but with the ops' names as in `OPS`."""
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
