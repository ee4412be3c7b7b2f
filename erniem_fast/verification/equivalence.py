"""When a result counts as equivalent to the reference's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf

import torch
from torch import Tensor

# In units in the last place of a tensor's largest value: rounding errors that the reference, by chance, does not make.
_SLACK = 8

# How many nonzero numbers the reference's largest error is taken from, and how often the reference runs at most.
_SAMPLE = 256
_MOST_DRAWS = 16


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        error: the largest deviation from the exact result.
        bound: the largest deviation that is allowed.
    """

    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN

    @property
    def ratio(self) -> float:
        """The error relative to its bound: at most 1, or infinite beyond the bound."""
        if not self.holds:
            return inf
        return self.error / self.bound if self.error > 0 else 0.0


Draw = tuple[Sequence[Tensor], Sequence[Tensor]]


def draw(oracle: Callable[..., Sequence[Tensor]], inputs: Sequence[object]) -> list[Draw]:
    """The reference's results in the inputs' dtype and in float64: for the inputs, then for neighbours of the inputs.

    How much the reference loses by rounding is a matter of luck. The largest of many errors measures it fairly, the
    largest of a few does not, and a result may have few elements, or few that dropout leaves. Then the reference runs
    again on inputs that differ by single units in the last place, and so round differently. Each run is compared with
    float64 on the same inputs, so that only rounding counts, and not how much results depend on such units.

    Args:
        oracle: the reference; returns its results.
        inputs: its arguments: tensors, NamedTuples of tensors, or other values.

    Returns:
        For the inputs, then for each neighbour: the results in the inputs' dtype, and those in float64.
    """
    draws = [(oracle(*inputs), oracle(*map(_double, inputs)))]
    numbers = [count for result in draws[0][1] if (count := int(result.count_nonzero()))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1, min(_MOST_DRAWS, ceil(_SAMPLE / min(numbers, default=_SAMPLE)))):
        neighbours = [_neighbour(value, generator) for value in inputs]
        draws.append((oracle(*neighbours), oracle(*map(_double, neighbours))))
    return draws


def _double(value: object) -> object:
    return _with_floats(Tensor.double, value)


def _neighbour(value: object, generator: torch.Generator) -> object:
    """The value with each of its numbers moved by up to two units in the last place."""
    return _with_floats(partial(_rounded_otherwise, generator), value)


def _with_floats(change: Callable[[Tensor], Tensor], value: object) -> object:
    """The value, which may be a NamedTuple, with all of its floating-point tensors changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    return type(value)(*(_with_floats(change, field) for field in value)) if isinstance(value, tuple) else value


def _rounded_otherwise(generator: torch.Generator, value: Tensor) -> Tensor:
    units = torch.randint(-2, 3, value.shape, generator=generator).to(value.device)
    return (value.double() * (1.0 + units * torch.finfo(value.dtype).eps)).to(value.dtype)


def compare(result: Tensor, *draws: tuple[Tensor, Tensor], terms: float = 0.0) -> Comparison:
    """The error of a result and its bound: twice the reference's largest error in the same dtype, plus a slack.

    Values beyond the dtype's largest number count as that number, so that a result may overflow where the exact result
    does, with the same sign. The reference in the same dtype fails where it is NaN, or overflows and the exact result
    does not. There the result may be NaN or infinite too, but a finite one is held to the bound. Elsewhere it may not
    be NaN.

    Args:
        result: a kernel's result; its dtype sets the slack.
        draws: the reference's results in the same dtype and in float64, for the same inputs first, then for neighbours
            (see `draw`). All have the shape of `result`.
        terms: the largest of the terms that cancel, if the reference's results are 0 in every draw because equal terms
            cancel. The slack is then in units of the terms: a fused multiply-add, which rounds only one of two equal
            products before it subtracts them, leaves such a unit.
    """
    same_dtype, exact = draws[0]
    if exact.numel() == 0:
        return Comparison(0.0, 0.0)
    dtype = torch.finfo(result.dtype)
    fails = same_dtype.isnan() | (same_dtype.isinf() & ~(exact.abs() > dtype.max))
    error = _deviation(result, exact).masked_fill(fails & ~result.isfinite(), 0.0)
    # Where the reference has no finite number, it has no error either.
    errors = (_deviation(same, truth).where(same.isfinite() & ~truth.isnan(), 0.0) for same, truth in draws)
    largest = _bounded(exact, dtype).nan_to_num(0.0).abs().amax().item()
    if not any(same.any() or truth.any() for same, truth in draws):
        largest = terms
    slack = _SLACK * dtype.eps * max(largest, dtype.smallest_normal)
    return Comparison(error.amax().item(), 2 * max(deviation.amax().item() for deviation in errors) + slack)


def _deviation(result: Tensor, exact: Tensor) -> Tensor:
    dtype = torch.finfo(result.dtype)
    return (_bounded(result, dtype) - _bounded(exact, dtype)).abs()


def _bounded(x: Tensor, dtype: torch.finfo) -> Tensor:
    """In float64, with values beyond the dtype's largest number replaced by that number; NaN stays NaN."""
    return x.double().clamp(dtype.min, dtype.max)


_REMEDY = "Choose another implementation by its flag and report this with the output of `python -m erniem_fast status`."


def check(call: str, outputs: tuple[Tensor, ...], draws: list[Draw]) -> None:
    """Raises an error if a result is not equivalent to the reference's."""
    for index, output in enumerate(outputs):
        references = [(reference[index], exact[index]) for reference, exact in draws]
        expected, _ = references[0]
        if expected.numel() == 0:
            continue  # an implementation may save a tensor that the reference does not
        if output.shape != expected.shape or output.dtype != expected.dtype:
            raise RuntimeError(
                f"{call} disagrees with the reference: result {index} has shape {tuple(output.shape)} and dtype "
                f"{output.dtype}, not {tuple(expected.shape)} and {expected.dtype}. {_REMEDY}"
            )
        comparison = compare(output, *references)
        if not comparison.holds:
            raise RuntimeError(
                f"{call} disagrees with the reference: result {index} of shape {tuple(output.shape)} and dtype "
                f"{output.dtype} is off by {comparison.error:.3e}, the bound is {comparison.bound:.3e}. {_REMEDY}"
            )
