"""Kernels whose loops contain a known number of instructions, for `test_codegen.py`, which compiles and counts them."""

import torch
import triton
import triton.language as tl

WARPS, ROWS, COLUMNS = 4, 16, 32


@triton.jit(do_not_specialize=["steps"])
def _counted_kernel(
    x_ptr,
    out_ptr,
    steps,
    TERMS: tl.constexpr,
    MASKED: tl.constexpr,
    EXCHANGES: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    where = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x = tl.load(x_ptr + step * ROWS * BLOCK + where)
        for _ in tl.static_range(TERMS):
            total = total * x + x
        if MASKED:
            total = tl.where(where + step < 100, total, x)
        for _ in tl.static_range(EXCHANGES):
            total = tl.reshape(tl.trans(total), [ROWS, BLOCK])
    tl.store(out_ptr + where, total)
    # A second loop, without masks and shorter, that reads and writes nothing:
    for _ in tl.range(0, steps, num_stages=1):
        total = total * 0.5 + 1.0
    tl.store(out_ptr + where, total)


def launch(terms: int, masked: bool = False, exchanges: int = 0, stages: int = 1) -> None:
    x, out = torch.empty(64, ROWS, COLUMNS), torch.empty(ROWS, COLUMNS)
    _counted_kernel[(1,)](x, out, 64, terms, masked, exchanges, stages, ROWS, COLUMNS, num_warps=WARPS)
