"""`python -m erniem_fast verify` in several processes at once, because it spends its time compiling and on the host.

    python -m bench.gpu.verify_in_parallel DEVICE

Prints the checks that fail and a summary. The exit code is 1 if any failed.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from math import inf

import torch

from bench.machine import available_cores
from erniem_fast.verification.battery import battery, outcome

MOST_PROCESSES = 16
CHECK_BYTES = 6 * 10**9  # of a process, about: the reference computes in float64


def run_share(device: str, index: int, count: int) -> tuple[int, int]:
    """Runs every `count`-th check from `index` on; returns the number of checks and of failures."""
    share, failures = battery(torch.device(device))[index::count], 0
    for check in share:
        found = outcome(check)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other processes
        if not found.passed:
            failures += 1
            print(found.line, flush=True)
    return len(share), failures


def main(device: str) -> int:
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else inf
    processes = max(1, min(available_cores(), MOST_PROCESSES, free // CHECK_BYTES))
    # A process that was forked cannot use CUDA.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(run_share, device, index, processes) for index in range(processes)]
        checks, failures = map(sum, zip(*(share.result() for share in shares), strict=True))
    print(f"{checks} checks, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
