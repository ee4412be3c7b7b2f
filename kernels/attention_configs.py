"""How attention's kernels are launched: the tiles for each architecture, and the design of the backward.

The tiles are the largest that compile without spilling registers, with Triton 3.6 and 3.9 (bench/results/codegen.md),
or hold the longest sequence. For 16-bit heads of up to 64 on NVIDIA, they also leave room for two programs on a
multiprocessor, so that one multiplies while the other computes exponentials. Loops that stream tiles have three stages:
with two, Triton waits for a copy as soon as it is issued. On Hopper, the tiles for heads of 64 in 16 bits and more than
64 tokens are the fastest of a sweep on an H200 (bench/results/nvidia-h200/sweep-bfloat16.md); no others were timed.
"""

from dataclasses import dataclass
from functools import cache

import torch

from .device import Device, is_cdna, is_rdna


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        block: rows of the tile that a program owns: keys in a second pass and in a one-pass backward, else queries.
        step: rows of each tile that the program streams past its own.
        warps: warps of a program.
        stages: streamed tiles in flight.
    """

    block: int
    step: int
    warps: int
    stages: int


_LARGE_TILES = ("sm_90", "sm_100")  # wgmma and tcgen05 read operands from shared memory, which leaves registers free


@cache
def forward_config(
    arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int, dropout: bool, key_bias: bool = False
) -> Config:
    if is_rdna(arch):
        return _rdna_forward_config(dtype, head_dim, max_seqlen)
    if dtype == torch.float32:
        return Config(32, 32 if head_dim <= 64 else 16, warps=8, stages=1)
    if is_cdna(arch):
        return _cdna_forward_config(arch, head_dim, max_seqlen, dropout, key_bias)
    if head_dim > 128:
        return Config(64, 32, warps=8, stages=3 if arch in _LARGE_TILES else 1)
    if head_dim > 64:
        if arch not in _LARGE_TILES:
            if max_seqlen <= 64:
                return Config(64, 64, warps=8, stages=1)
            return Config(128, 16 if dropout else 32, warps=8, stages=3)
        if dropout or max_seqlen <= 64:
            return Config(64, 32, warps=4, stages=3)
        return Config(128, 64, warps=8, stages=3)
    if arch == "sm_100" and max_seqlen > 64 and not dropout and not key_bias:  # with either, it spills
        return Config(128, 128, warps=8, stages=3)  # its products are twice as fast with 128 rows
    # Two to four programs fit at any length. On an H200, 77 us at 512 tokens, with 128 rows and 8 warps 82.
    block, step = _rows_of(max_seqlen, arch)
    return Config(block, step, warps=4, stages=3)


@cache
def backward_config(
    arch: str, dtype: torch.dtype, head_dim: int, dropout: bool, key_bias: bool = False, key_ranges: bool = False
) -> Config:
    """The tiles of both passes. Each holds two operands and one or two sums, so they are smaller than the forward's."""
    if is_rdna(arch):
        return _rdna_backward_config(dtype, head_dim, plain=not (dropout or key_bias or key_ranges))
    if dtype == torch.float32:
        if head_dim > 64:
            return Config(16, 16, warps=8, stages=1)
        if is_cdna(arch):
            return Config(32, 16, warps=8, stages=1)
        return Config(32, 32, warps=4 if head_dim <= 32 else 8, stages=1)
    if head_dim > 128:
        return Config(16, 32, warps=4, stages=1)
    if is_cdna(arch):
        if head_dim > 64:
            return Config(64, 16, warps=8, stages=2)
        return Config(128, 16 if dropout else 32, warps=8, stages=1)
    if head_dim > 64:
        return Config(64, 32, warps=8, stages=1 if arch == "sm_120" else 3)
    if arch == "sm_100":
        return Config(128, 32 if key_ranges else 64, warps=8, stages=3)
    # Two programs of 4 warps can have 255 registers, which the second pass takes; the widest steps that do not spill:
    # (timed on an H200: with dropout at 512 tokens 465 us, with a step of 64 488, with 128 rows and 8 warps 528)
    if arch == "sm_90":
        return Config(64, 32 if dropout or key_ranges else 64, warps=4, stages=3)
    return Config(64, 16 if dropout and (key_bias or key_ranges) else 32, warps=4, stages=3)


@cache
def one_pass_config(arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Config | None:
    """The tiles of the one-pass backward, which adds a third sum, over `step` queries, to two operands and two sums.

    None for RDNA: its registers hold all that for at most 32 keys, so the queries' sums would go to memory too often.
    """
    if is_rdna(arch):
        return None
    if dtype == torch.float32:
        block, step = (32, 32 if arch == "sm_100" else 16) if head_dim <= 32 else (16, 32 if head_dim <= 64 else 16)
        return Config(block, step, warps=8, stages=1)
    step = 16 if is_cdna(arch) else 32
    if head_dim > 128:
        return Config(16 if is_cdna(arch) else 32, step, warps=8, stages=1)
    if head_dim > 64:
        return Config(64, 16, warps=8, stages=2 if arch == "sm_90" else 1)
    if max_seqlen <= 64:  # One tile needs no loop: 9 to 20 % fewer instructions on NVIDIA's than two steps of 32.
        block, step = _rows_of(max_seqlen, arch)
        return Config(block, step, warps=4, stages=1)
    if arch == "sm_90" and max_seqlen <= 128:
        return Config(64, 64, warps=4, stages=1)  # on an H200 134 us with dropout, 128 rows of 8 warps 181
    return Config(128, step, warps=8, stages=1)


def _rows_of(max_seqlen: int, arch: str) -> tuple[int, int]:
    """The block and the step of tiles with few rows: 64, or 32 where no sequence has more.

    The products of Hopper and of Blackwell for data centres have 64 rows at least.
    """
    if max_seqlen > 32:
        return 64, 64
    return 64 if arch in _LARGE_TILES else 32, 32


def _cdna_forward_config(arch: str, head_dim: int, max_seqlen: int, dropout: bool, key_bias: bool) -> Config:
    if head_dim > 128:
        return Config(64, 32, warps=8, stages=1 if dropout else 2)
    if head_dim > 64:
        if dropout or max_seqlen <= 64:
            return Config(64, 32, warps=4, stages=2)
        return Config(128, 64, warps=8, stages=1)
    if max_seqlen <= 64:
        block, step = _rows_of(max_seqlen, arch)
        return Config(block, step, warps=4, stages=2)
    return Config(128, 32 if key_bias else 64, warps=8, stages=3)


def _rdna_forward_config(dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Config:
    """v_wmma reads its operands from a lane's 256 registers, and needs each operand twice."""
    if dtype == torch.float32:
        return Config(32, 16, warps=8, stages=1)
    if head_dim > 128:
        return Config(32, 16, warps=16, stages=1)
    if head_dim > 64:
        return Config(64, 16, warps=8, stages=1)
    return Config(64, 32, warps=4, stages=1) if max_seqlen <= 64 else Config(128, 32, warps=8, stages=1)


def _rdna_backward_config(dtype: torch.dtype, head_dim: int, plain: bool) -> Config:
    if dtype == torch.float32 or head_dim > 64:
        return Config(16, 8, warps=8, stages=1)
    return Config(64 if plain else 32, 16, warps=8, stages=1)


def takes_one_pass(config: Config | None, pairs: int, max_seqlen: int, dropout: bool, device: Device) -> bool:
    """Whether one pass of the backward takes less time than two, for `pairs` pairs of a sequence and a head.

    On Hopper it does where a block holds all keys of 64 tokens (on an H200, even in two steps 105 us against 113), and
    with dropout where two steps hold them (at 128 tokens, 134 us against 148), if the pairs fill the device; at 512
    tokens, with dropout, it took 477 us against 372.

    On other architectures this is counted, not timed. One pass takes 5 matrix products per tile and draws the dropout
    mask once; two passes take 7 and draw it twice. If a block holds all keys of a sequence, one pass does less of
    everything. If not, its sums go to memory and back, which costs about as much as the two products that it saves, and
    only one program works on each pair. So it then needs a dropout mask to save, and enough pairs to fill the device
    more than once.
    """
    if config is None:
        return False
    saves_a_mask = dropout and pairs >= 2 * device.multiprocessors
    if device.arch == "sm_90":
        in_two_steps = config.step == 64 and max_seqlen <= 128
        return max_seqlen <= min(64, config.block) or (in_two_steps and saves_a_mask)
    return max_seqlen <= config.block or saves_a_mask
