"""What launch configurations depend on: a device's architecture, its multiprocessors and the width of its warps."""

from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        arch: the name that its vendor gives it: "sm_90" for one of NVIDIA's, "gfx942" for one of AMD's; "cpu" where
            kernels are interpreted.
        multiprocessors: how many there are; AMD calls them compute units.
        lanes: threads of a warp, which AMD calls a wave.
    """

    arch: str
    multiprocessors: int
    lanes: int


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def is_cdna(arch: str) -> bool:
    """AMD's for computing: warps of 64 lanes, and up to 512 registers a lane."""
    return arch.startswith("gfx9")


def is_rdna(arch: str) -> bool:
    """AMD's for graphics: warps of 32 lanes, and up to 256 registers a lane."""
    return is_amd(arch) and not is_cdna(arch)


@cache
def describe(device: torch.device) -> Device:
    """The properties of a device; those of a small GPU for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return Device("cpu", multiprocessors=2, lanes=32)
    properties = torch.cuda.get_device_properties(device)
    nvidia = f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName.partition(":")[0] if torch.version.hip else nvidia  # "gfx942:sramecc+:xnack-"
    return Device(arch, properties.multi_processor_count, properties.warp_size)


def share(rows: int, tile: int, programs: int) -> tuple[int, int]:
    """Splits rows evenly: how many of at most `programs` programs are needed, and the rows of each, whole tiles.

    At least one program runs, so that sums over no rows at all come out as zeros.
    """
    tiles = triton.cdiv(rows, tile)
    tiles_per_program = max(1, triton.cdiv(tiles, max(1, programs)))
    return max(1, triton.cdiv(tiles, tiles_per_program)), tiles_per_program * tile
