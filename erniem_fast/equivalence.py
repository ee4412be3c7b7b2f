"""When a result counts as the reference's: the first rule of the kernels."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

# Units in the last place of a tensor's largest value: rounding that the reference, by chance, is spared.
_SLACK = 8


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
        return self.error <= self.bound  # which NaN is not; infinity is where the reference overflows too

    @property
    def ratio(self) -> float:
        """How near the error is to its bound: at most 1, infinite beyond it."""
        if not self.holds:
            return inf
        return self.error / self.bound if 0 < self.error < inf else 0.0


def compare(result: Tensor, same_dtype: Tensor, exact: Tensor) -> Comparison:
    """The error of a result, allowed twice that of the reference in the same dtype, plus a slack.

    Args:
        result: of a kernel; its dtype sets the slack.
        same_dtype: the reference's, from the same inputs.
        exact: the reference's in float64. All have one shape.
    """
    if exact.numel() == 0:
        return Comparison(0.0, 0.0)
    slack = _SLACK * torch.finfo(result.dtype).eps * _largest(exact)
    return Comparison(_largest(result - exact), 2 * _largest(same_dtype - exact) + slack)


def _largest(x: Tensor) -> float:
    return x.double().abs().amax().item()
