"""The implementations of an op, and the choice of one for each call."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf

import torch
from torch import Tensor

from .. import flags

Tensors = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        forward, backward: functions that take those of the op's arguments that they have parameters for; see `Op`.
        refuses: returns why it cannot serve a device and dtype, with the remedy, or None if it can.
        prepare: makes it ready to serve a device; called when a flag asks for it by name.
        forward_in_place: a forward that writes its result over an argument; None if there is no such function.
        saves: whether its forward returns, beside the result, the tensors that the op declares for the backward.
        fuses_bias: whether adding the bias of the matrix product before it is cheaper here than in the product.
        automatic: returns whether `auto` may choose it on a device.
        largest: the largest size that it can serve; see `choose`.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    refuses: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    prepare: Callable[[torch.device], None] = lambda device: None
    forward_in_place: Callable[..., Tensors] | None = None
    saves: bool = True
    fuses_bias: bool = False
    automatic: Callable[[torch.device], bool] = lambda device: True
    largest: float = inf

    def objection(self, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
        """Why it cannot serve a call, with the remedy; None if it can."""
        if size > self.largest:
            return f"it is built for sizes up to {self.largest}, not {size}; choose `torch`."
        return self.refuses(device, dtype)


# By the op's name (a key of `flags.OPS`) and the implementation's, the preferred one first. Each `Op` adds its own to
# the tables of the flags, so that a flag takes the name of every implementation there is.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {op: flag.implementations for op, flag in flags.OPS.items()}


@torch.compiler.assume_constant_result  # in a graph of torch.compile the choice is a constant
@flags.while_held
def choose(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str:
    """The name of the implementation that runs a call: the flag's or, with `auto`, the first that can serve it.

    Args:
        op: a key of `flags.OPS`.
        device, dtype: those of the op's input.
        size: head_dim for attention; the other ops serve every size.

    Raises:
        ValueError: a flag has a value that it does not take.
        RuntimeError: the op's flag asks for an implementation that cannot serve this device, dtype and size.
    """
    implementations = IMPLEMENTATIONS[op]
    wanted = flags.read(flags.OPS[op])
    if wanted != "auto":
        implementations[wanted].prepare(device)
        reason = implementations[wanted].objection(device, dtype, size)
        if reason is not None:
            raise RuntimeError(f"{flags.OPS[op].name}={wanted} cannot be served: {reason}")
        return wanted
    if flags.read(flags.KERNELS) == "off":
        return "torch"
    automatic = ((name, candidate) for name, candidate in implementations.items() if candidate.automatic(device))
    return next(name for name, candidate in automatic if candidate.objection(device, dtype, size) is None)


def missing(device: torch.device) -> dict[str, str]:
    """Why `auto` leaves ops to PyTorch that kernels could run on a device, with the remedy, by op; empty if none."""
    found = {}
    for op, implementations in IMPLEMENTATIONS.items():
        is_free = flags.read(flags.OPS[op]) == "auto" and flags.read(flags.KERNELS) == "auto"
        if is_free and choose(op, device, torch.float32) == "torch":
            automatic = (each for each in implementations.values() if each.automatic(device))
            found[op] = next(filter(None, (each.refuses(device, torch.float32) for each in automatic)))
    return found


def fuses_bias(op: str, x: Tensor) -> bool:
    """Whether the op's implementation for inputs like `x` adds the bias of the matrix product before it."""
    return IMPLEMENTATIONS[op][choose(op, x.device, x.dtype)].fuses_bias


def arguments_of(function: Callable[..., object], values: dict[str, object]) -> dict[str, object]:
    """The values that the function has parameters for; all values if it takes any name."""
    names = parameters(function)
    return values if names is None else {name: values[name] for name in names if name in values}


@cache
def parameters(function: Callable) -> tuple[str, ...] | None:
    """The names of a function's parameters; None if it takes any name (`**`)."""
    found = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)
    return None if takes_any else tuple(parameter.name for parameter in found)
