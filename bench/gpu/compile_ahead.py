"""Run the checks of `python -m erniem_fast verify` in several processes at once, and report no results.

    python -m bench.gpu.compile_ahead DEVICE

Their kernels are then in Triton's cache, and `verify` itself, which compiles one after another, has little to wait for.
"""

import contextlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.machine import available_cores
from erniem_fast.verify.battery import battery

MOST_PROCESSES = 16


def run_share(device: str, index: int, count: int) -> None:
    """Runs every `count`-th check from `index` on; what fails will fail again where it is reported."""
    for check in battery(torch.device(device))[index::count]:
        with contextlib.suppress(Exception):
            check.run()


def main(device: str) -> None:
    count = min(available_cores(), MOST_PROCESSES)
    # A process that was forked cannot use CUDA.
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        for share in [pool.submit(run_share, device, index, count) for index in range(count)]:
            share.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
