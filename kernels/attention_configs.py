"""How attention's kernels are launched: their tiles, by architecture, and the design of the backward.

Tiles are the largest that spill no registers, by what they compile to (bench/results/codegen.md). No other choice has
been timed yet.
"""

from dataclasses import dataclass

import torch

from .device import Device, is_cdna, is_rdna


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        block: rows of the tile that a program owns: queries; keys in the second pass of a backward, and in one pass.
        step: rows of the tiles that it streams past its own.
        warps: warps of a program.
        stages: streamed tiles in flight.
    """

    block: int
    step: int
    warps: int
    stages: int


_LARGE_TILES = ("sm_90", "sm_100")  # wgmma and tcgen05 read their operands from shared memory: registers are free


def forward_config(arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int, dropout: bool) -> Config:
    if is_rdna(arch):
        return _rdna_forward_config(dtype, head_dim, max_seqlen)
    if dtype == torch.float32:
        return Config(32, 32 if head_dim <= 64 else 16, warps=8, stages=1)
    if head_dim > 128:
        return Config(64, 32, warps=8, stages=2)
    if head_dim > 64:
        if dropout or max_seqlen <= 64:
            return Config(64, 32, warps=4, stages=2)
        return Config(128, 64, warps=8, stages=1 if is_cdna(arch) else 2)
    if max_seqlen <= 64:
        return Config(64, 64, warps=4, stages=2)
    return Config(128, 128 if arch in _LARGE_TILES and not dropout else 64, warps=8, stages=3)


def backward_config(arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Config:
    """Of two passes. Both hold two operands and one or two sums, so tiles are smaller than the forward's."""
    if is_rdna(arch):
        return _rdna_backward_config(dtype, head_dim)
    if dtype == torch.float32:
        if head_dim > 64:
            return Config(16, 16, warps=8, stages=1)
        return Config(32, 16 if is_cdna(arch) else 32, warps=8, stages=1)
    if head_dim > 128:
        return Config(16, 32, warps=4, stages=1)
    if head_dim > 64 and is_cdna(arch):
        return Config(64, 16, warps=8, stages=2)
    if head_dim > 64 or arch == "sm_120":
        return Config(64, 32, warps=8, stages=1 if head_dim > 64 and arch == "sm_120" else 2)
    step = 64 if arch in _LARGE_TILES else 32
    if max_seqlen <= 64:
        return Config(64, step, warps=4, stages=1)
    return Config(128, step, warps=8, stages=1 if is_cdna(arch) else 2)


def one_pass_config(arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Config | None:
    """Of one pass, which beside two operands and two sums makes a third one, a step of queries wide.

    None for RDNA, whose registers hold it for 32 keys at most, so that the queries' sums would go to memory too often.
    """
    if is_rdna(arch):
        return None
    if dtype == torch.float32:
        block, step = (32, 16) if head_dim <= 32 else (16, 32 if head_dim <= 64 else 16)
        return Config(block, step, warps=8, stages=1)
    step = 16 if is_cdna(arch) else 32
    if head_dim > 128:
        return Config(32, step, warps=8, stages=1)
    if head_dim > 64:
        return Config(64, 16, warps=8, stages=2)
    if max_seqlen <= 64:
        return Config(64, 32, warps=8 if arch == "sm_120" else 4, stages=1)
    return Config(128, step, warps=8, stages=1)


def _rdna_forward_config(dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Config:
    """A lane has 256 registers, and v_wmma takes its operands from them, each twice."""
    if dtype == torch.float32:
        return Config(32, 16, warps=8, stages=1)
    if head_dim > 128:
        return Config(32, 16, warps=16, stages=1)
    if head_dim > 64:
        return Config(64, 32, warps=8, stages=1)
    return Config(64, 32, warps=4, stages=1) if max_seqlen <= 64 else Config(128, 32, warps=8, stages=1)


def _rdna_backward_config(dtype: torch.dtype, head_dim: int) -> Config:
    if dtype == torch.float32 or head_dim > 64:
        return Config(16, 8, warps=8, stages=1)
    return Config(64, 16, warps=8, stages=1)


def takes_one_pass(config: Config | None, pairs: int, max_seqlen: int, dropout: bool, device: Device) -> bool:
    """Which design of the backward has less to do, of so many pairs of a sequence and a head.

    This is counted, not timed; `python -m bench kernels` times both on a GPU. One pass takes 5 matrix products a tile
    and draws dropout's mask once; two take 7 and draw it twice. Where a block holds all keys of a sequence, one pass is
    the lesser in everything. Beyond, its sums go to memory and back, which costs about what the two products do, and a
    pair is one program's: so there have to be a mask to save, and enough pairs to fill the device more than once.
    """
    if config is None:
        return False
    if max_seqlen <= config.block:
        return True
    return dropout and pairs >= 2 * device.multiprocessors
