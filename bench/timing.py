"""Seconds of single calls on one device, and the rates that no call can beat."""

import time

import torch

from bench.model.summary import quartiles

WARM_UP = 3
# More than any cache holds. Writing it before a call empties the caches, and takes a GPU long enough for the host to
# launch what is timed meanwhile: the kernels are measured, not the launches.
FLUSH_BYTES = 512 * 2**20


def take_turns(calls, rounds, device, bar=None):
    """Seconds of each of the calls, `rounds` of them, taken in turn so that what disturbs the machine disturbs all.

    Args:
        calls: functions without arguments.
        rounds: timed rounds, after some that warm up.
        device: where the calls run.
        bar: tqdm's bar, which moves by one per round.
    """
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    seconds = [[] for _ in calls]
    for turn in range(WARM_UP + rounds):
        for index in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            taken = _seconds(calls[index], device, flush)
            if turn >= WARM_UP:
                seconds[index].append(taken)
        if bar is not None:
            bar.update()
    return seconds


def _seconds(call, device, flush):
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


def measured_rates(device, dtype, rounds=10):
    """What the device reaches: bytes read and written a second by a copy, and FLOP a second by a matrix product."""
    large = device.type == "cuda"
    source = torch.ones(2**30 if large else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copy, product = take_turns([lambda: target.copy_(source), lambda: left @ right], rounds, device)
    return {
        "bytes_per_second": 2 * source.numel() / quartiles(copy)["median"],
        "flops_per_second": 2 * size**3 / quartiles(product)["median"],
    }
