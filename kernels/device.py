"""What launch configurations depend on: the architecture of a device and how many multiprocessors it has."""

from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        arch: compute capability as one number, 90 for sm_90; 0 where it is not an NVIDIA GPU.
        multiprocessors: how many there are.
    """

    arch: int
    multiprocessors: int


@cache
def describe(device: torch.device) -> Device:
    """The properties of a device; those of a small GPU for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return Device(arch=0, multiprocessors=2)
    properties = torch.cuda.get_device_properties(device)
    arch = 0 if torch.version.hip else 10 * properties.major + properties.minor
    return Device(arch, properties.multi_processor_count)


def share(rows: int, tile: int, programs: int) -> tuple[int, int]:
    """Splits rows evenly: how many of at most `programs` programs are needed, and the rows of each, whole tiles.

    At least one program runs, so that sums over no rows at all come out as zeros.
    """
    tiles = triton.cdiv(rows, tile)
    tiles_per_program = max(1, triton.cdiv(tiles, max(1, programs)))
    return max(1, triton.cdiv(tiles, tiles_per_program)), tiles_per_program * tile
