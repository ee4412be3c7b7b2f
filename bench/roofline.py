"""The roofline of a device: the least time that some work takes at the measured rates of a copy and of a product."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import WARM_UP, quartiles, take_turns
from erniem_fast.matmul.libraries import LIBRARIES, available

# Of what the rates are measured with: bytes that a copy reads, beyond the caches, and rows of square matrices.
COPIED = {"cpu": 2**26, "cuda": 2**30}
MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes read and written by a large copy, and FLOP of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float


class Work(NamedTuple):
    """The fewest bytes that something reads and writes, and the fewest FLOP that it takes."""

    bytes: float = 0
    flops: float = 0

    def floor(self, rates: Rates) -> float:
        """Seconds that it takes at the least."""
        return max(self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second)


def measure_rates(device: torch.device, dtype: torch.dtype, rounds: int = 10, warm_up: int = WARM_UP) -> Rates:
    """Medians over `rounds`; the product is one of matrices of `dtype`, by the fastest of the libraries for it."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    size = MATRIX[device.type]
    left, right, product = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    calls = [lambda: target.copy_(source), *_products(left, right, product)]
    taken = take_turns(calls, rounds, device, warm_up=warm_up)
    copy, *products = (quartiles([each.seconds for each in turns]).median for turns in taken)
    return Rates(2 * source.numel() / copy, 2 * size**3 / min(products))


def _products(left: Tensor, right: Tensor, out: Tensor) -> list[Callable[[], Tensor]]:
    """The calls of every library that multiplies these matrices; on some processors PyTorch's own is half as fast."""
    if left.device.type == "cpu" and left.dtype == torch.float32:
        return [partial(LIBRARIES[name], left, right, None, out) for name in available()]
    return [partial(torch.mm, left, right, out=out)]
