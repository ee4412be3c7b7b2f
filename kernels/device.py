"""What launch configurations depend on: a device's architecture, number of multiprocessors and warp width."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        arch: the vendor's name for the architecture, such as "sm_90" (NVIDIA) or "gfx942" (AMD); "cpu" where kernels
            are interpreted.
        multiprocessors: their number; AMD calls them compute units.
        lanes: threads of a warp; AMD calls it a wave.
    """

    arch: str
    multiprocessors: int
    lanes: int


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def is_cdna(arch: str) -> bool:
    """Whether it is one of AMD's architectures for computing: warps of 64 lanes, up to 512 registers a lane."""
    return arch.startswith("gfx9")


def is_rdna(arch: str) -> bool:
    """Whether it is one of AMD's architectures for graphics: warps of 32 lanes, up to 256 registers a lane."""
    return is_amd(arch) and not is_cdna(arch)


@cache
def describe(device: torch.device) -> Device:
    """The properties of a device; for the CPU, where kernels are interpreted, those of a small GPU."""
    if device.type != "cuda":
        return Device("cpu", multiprocessors=2, lanes=32)
    properties = torch.cuda.get_device_properties(device)
    nvidia = f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName.partition(":")[0] if torch.version.hip else nvidia  # "gfx942:sramecc+:xnack-"
    return Device(arch, properties.multi_processor_count, properties.warp_size)


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own, made for kernels, takes the host a third of a launch's time."""
    return -(-x // y)


def share(rows: int, tile: int, programs: int) -> tuple[int, int]:
    """Splits rows evenly into whole tiles: the number of programs, at most `programs`, and the rows of each.

    At least one program runs, so that sums over zero rows come out as zeros.
    """
    tiles = cdiv(rows, tile)
    tiles_per_program = max(1, cdiv(tiles, max(1, programs)))
    return max(1, cdiv(tiles, tiles_per_program)), tiles_per_program * tile
