"""Seconds of calls on one device, taken in turn, and their quartiles."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

WARM_UP = 3
# More than any cache holds. Writing it before a call empties the caches, and takes a GPU long enough for the host to
# launch what is timed meanwhile: the kernels are measured, not the launches.
FLUSH_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Quartiles:
    q1: float
    median: float
    q3: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile, interpolated as NumPy does."""
    return Quartiles(*map(float, np.percentile(values, [25, 50, 75])))


def take_turns(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device, bar=None, warm_up: int = WARM_UP
) -> list[list[float]]:
    """Seconds of each of the calls, `rounds` of them, taken in turn so that what disturbs the machine disturbs all.

    Args:
        calls: functions without arguments.
        rounds: timed rounds.
        device: where the calls run.
        bar: tqdm's bar, which moves by one per round.
        warm_up: rounds before, which are not timed.
    """
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    seconds = [[] for _ in calls]
    for turn in range(warm_up + rounds):
        for index in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            taken = seconds_of(calls[index], device, flush)
            if turn >= warm_up:
                seconds[index].append(taken)
        if bar is not None:
            bar.update()
    return seconds


def seconds_of(call: Callable[[], object], device: torch.device, flush: torch.Tensor | None = None) -> float:
    """Seconds that one call takes; on a GPU `flush` is written before, see FLUSH_BYTES."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
