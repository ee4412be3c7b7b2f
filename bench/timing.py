"""Seconds of calls on one device, taken in turn, and their quartiles."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

WARM_UP = 3
FLUSH_BYTES = 512 * 2**20  # more than any cache holds
# How often the buffer of that size is read before a call at first, and at most: an H200 takes 0.13 ms for each.
READS, MOST_READS = 4, 64


@dataclasses.dataclass(frozen=True)
class Quartiles:
    q1: float
    median: float
    q3: float


class Taken(NamedTuple):
    """What a call took.

    Attributes:
        seconds: on a GPU those of its kernels alone, unless the call waits for them.
        host: on a GPU, the seconds until the call returned; None on a CPU, where `seconds` are that.
    """

    seconds: float
    host: float | None


class Flush:
    """Reads a large buffer before a call on a GPU, which empties the caches and keeps the GPU busy.

    (Writes would leave changed lines in the caches, and the call would wait for their way to memory.) While the GPU is
    busy, the host launches all that the call consists of, so that the kernels run without a gap and the time between
    the events before and after them is theirs.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._reads = READS

    def start(self) -> None:
        for _ in range(self._reads):
            self._buffer.sum()

    def lengthen(self) -> bool:
        """Doubles the time that `start` takes; returns False if it takes as long as it may."""
        self._reads *= 2
        may = self._reads <= MOST_READS
        self._reads = min(self._reads, MOST_READS)
        return may


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile, interpolated as NumPy does."""
    return Quartiles(*map(float, np.percentile(values, [25, 50, 75])))


def take_turns(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device, bar=None, warm_up: int = WARM_UP
) -> list[list[Taken]]:
    """What each of the calls takes, `rounds` times, in turn so that what disturbs the machine disturbs all.

    Args:
        calls: functions without arguments, which may be called any number of times.
        rounds: timed rounds.
        device: where the calls run.
        bar: tqdm's bar, which moves by one per round.
        warm_up: rounds before, which are not timed.
    """
    on_gpu = device.type == "cuda"
    flush = Flush(torch.zeros(FLUSH_BYTES // 4, device=device)) if on_gpu else None
    taken = [[] for _ in calls]
    for turn in range(warm_up + rounds):
        for index in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            one = time_call(calls[index], device, flush)
            if turn >= warm_up:
                taken[index].append(one)
        if bar is not None:
            bar.update()
    return taken


def time_call(call: Callable[[], object], device: torch.device, flush: Flush | None = None) -> Taken:
    """What one call takes; on a GPU, `flush` comes before it."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return Taken(time.perf_counter() - start, None)
    while True:
        taken, waited = _time_on_gpu(call, device, flush)
        if not (waited and flush.lengthen()):
            return taken


def _time_on_gpu(call: Callable[[], object], device: torch.device, flush: Flush) -> tuple[Taken, bool]:
    """What the call takes, and whether the GPU had nothing left to do before the host had launched everything."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    flush.start()
    start.record()
    before = time.perf_counter()
    call()
    host = time.perf_counter() - before
    waited = start.query()
    end.record()
    end.synchronize()
    return Taken(start.elapsed_time(end) / 1e3, host), waited
