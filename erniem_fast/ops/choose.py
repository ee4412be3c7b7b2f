"""What an implementation of an op is, and which one runs a call."""

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
        forward, backward: functions of those of the op's arguments that they name as parameters; see `Op`.
        refuses: why it cannot serve a device and dtype, with the remedy; None if it can.
        prepare: makes it ready to serve a device, for callers that ask for it by name.
        forward_in_place: a forward whose result takes the memory of an argument; None if there is none.
        saves: whether its forward returns what the op declares for the backward, beside the result.
        fuses_bias: whether adding the bias of the matrix product before it is cheaper here than in the product.
        automatic: whether `auto` takes it on a device that it can serve.
        largest: the largest size that it can serve, see `choose`.
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


# The implementations of each op, by the names of `flags.OPS` and their own, the preferred first; every op adds its own.
# They are the tables of the flags, so that a flag takes the name of every implementation there is.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {op: flag.implementations for op, flag in flags.OPS.items()}


@torch.compiler.assume_constant_result  # torch.compile takes the choice as a constant of its graph
@flags.while_held
def choose(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str:
    """The implementation that runs a call: the flag's, or with `auto` the first that can serve it.

    Args:
        op: a key of `flags.OPS`.
        device, dtype: of the op's input.
        size: head_dim for attention; the other ops have none.

    Raises:
        RuntimeError: the flag asks for an implementation that cannot serve this device, dtype and size.
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
    served = (each for each in implementations.items() if each[1].automatic(device))
    return next(name for name, each in served if each.objection(device, dtype, size) is None)


def fuses_bias(op: str, x: Tensor) -> bool:
    """Whether the op, for inputs like `x`, wants to add the bias of the matrix product before it."""
    return IMPLEMENTATIONS[op][choose(op, x.device, x.dtype)].fuses_bias


def arguments_of(function: Callable[..., object], values: dict[str, object]) -> dict[str, object]:
    """Those of the values that the function has parameters for; all of them if it takes any."""
    names = parameters(function)
    return values if names is None else {each: values[each] for each in names if each in values}


@cache
def parameters(function: Callable) -> tuple[str, ...] | None:
    """The names of a function's parameters; None if it takes any."""
    found = inspect.signature(function).parameters.values()
    return None if any(each.kind is each.VAR_KEYWORD for each in found) else tuple(each.name for each in found)
