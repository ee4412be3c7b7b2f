"""When a result counts as the reference's: the first rule of the kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf

import torch
from torch import Tensor

# Units in the last place of a tensor's largest value: rounding that the reference, by chance, is spared.
_SLACK = 8

# The numbers from which the largest error of the reference is taken, and how often it runs for them at most.
_SAMPLE = 256
_MOST_DRAWS = 16


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        error: the largest deviation from the exact result.
        bound: the largest that is allowed.
    """

    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # which NaN is not

    @property
    def ratio(self) -> float:
        """How near the error is to its bound: at most 1, infinite beyond it."""
        if not self.holds:
            return inf
        return self.error / self.bound if self.error > 0 else 0.0


Draw = tuple[Sequence[Tensor], Sequence[Tensor]]


def draw(oracle: Callable[..., Sequence[Tensor]], inputs: Sequence[object]) -> list[Draw]:
    """The reference's results in the inputs' dtype and in float64; of the inputs first, then of neighbours of theirs.

    How much rounding costs the reference is a matter of luck, and the largest of many errors is a fair measure of it
    where that of a few is not: a result may have few elements, or dropout leave few of them. There the reference is run
    again on inputs that differ by single units in the last place, which are rounded differently. It is compared with
    float64 on the same inputs, so that it is only this that counts, and not how much results depend on such units.
    """
    draws = [(oracle(*inputs), oracle(*map(_double, inputs)))]
    numbers = [count for each in draws[0][1] if (count := int(each.count_nonzero()))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1, min(_MOST_DRAWS, ceil(_SAMPLE / min(numbers, default=_SAMPLE)))):
        neighbours = [_neighbour(each, generator) for each in inputs]
        draws.append((oracle(*neighbours), oracle(*map(_double, neighbours))))
    return draws


def _double(value: object) -> object:
    return _with_floats(Tensor.double, value)


def _neighbour(value: object, generator: torch.Generator) -> object:
    """The value with each number up to two units in the last place away."""
    return _with_floats(partial(_rounded_otherwise, generator), value)


def _with_floats(change: Callable[[Tensor], Tensor], value: object) -> object:
    """The value, which may be a NamedTuple, with all of its floating-point tensors changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    return type(value)(*(_with_floats(change, each) for each in value)) if isinstance(value, tuple) else value


def _rounded_otherwise(generator: torch.Generator, value: Tensor) -> Tensor:
    units = torch.randint(-2, 3, value.shape, generator=generator).to(value.device)
    return (value.double() * (1.0 + units * torch.finfo(value.dtype).eps)).to(value.dtype)


def compare(result: Tensor, *draws: tuple[Tensor, Tensor]) -> Comparison:
    """The error of a result, allowed twice the largest of the reference in the same dtype, plus a slack.

    What is beyond the dtype's largest number counts as that number, so that a result may overflow where the exact one
    does, with its sign. Where the reference in the same dtype fails, for it is NaN or overflows alone, the result may
    be NaN or infinite too; as a number it is held to the bound there as everywhere. Nothing else may be NaN.

    Args:
        result: of a kernel; its dtype sets the slack.
        draws: the reference's results in the same dtype and in float64, of the same inputs first, then of neighbours
            (see `draw`). All have one shape.
    """
    same_dtype, exact = draws[0]
    if exact.numel() == 0:
        return Comparison(0.0, 0.0)
    dtype = torch.finfo(result.dtype)
    fails = same_dtype.isnan() | (same_dtype.isinf() & ~(exact.abs() > dtype.max))
    error = _deviation(result, exact).masked_fill(fails & ~result.isfinite(), 0.0)
    # Where the reference has no number, it has no error either.
    errors = (_deviation(same, truth).where(same.isfinite() & ~truth.isnan(), 0.0) for same, truth in draws)
    largest = _bounded(exact, dtype).nan_to_num(0.0).abs().amax().item()
    slack = _SLACK * dtype.eps * max(largest, dtype.smallest_normal)
    return Comparison(error.amax().item(), 2 * max(each.amax().item() for each in errors) + slack)


def _deviation(result: Tensor, exact: Tensor) -> Tensor:
    dtype = torch.finfo(result.dtype)
    return (_bounded(result, dtype) - _bounded(exact, dtype)).abs()


def _bounded(x: Tensor, dtype: torch.finfo) -> Tensor:
    """In float64, with the dtype's largest number for what is beyond it; NaN stays NaN."""
    return x.double().clamp(dtype.min, dtype.max)
