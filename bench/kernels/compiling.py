"""Compiles the kernels for an architecture that is not here.

The launches are the kernels' own: only the driver is replaced, by one that names the architecture, and the launch
itself, by compilation. So configurations, argument types and alignment are what a GPU of that kind would get.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from erniem_fast.kernels import add_norm, attention, bias_gelu, device

KIB = 1024
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        shared: bytes of shared memory that a program may have.
        pool: bytes of shared memory of a multiprocessor.
        reserved: bytes of it that every program takes besides its own.
        warps: that a multiprocessor holds at most; it has four parts, which share them evenly.
        programs: that a multiprocessor holds at most.
        products: the instruction that multiplies matrices of 16-bit numbers.
        lanes: threads of a warp.
        registers: of all lanes of a multiprocessor.
        granule: registers of a lane come in multiples of it.
    """

    shared: int
    pool: int
    reserved: int
    warps: int
    programs: int
    products: str = "mma.sync"
    lanes: int = 32
    registers: int = 65536
    granule: int = 8

    def fits(self, registers: int, shared: int, warps: int) -> int:
        """How many programs of so many warps a multiprocessor holds, by a lane's registers and a program's bytes."""
        registers = -(-registers // self.granule) * self.granule
        resident = 4 * min(self.warps // 4, self.registers // 4 // (registers * self.lanes))
        by_shared = self.pool // max(1, shared + self.reserved)
        return min(self.programs, resident // warps, by_shared)


ARCHITECTURES = {
    "sm_75": Architecture(64 * KIB, 64 * KIB, 0, warps=32, programs=16),
    "sm_80": Architecture(163 * KIB, 164 * KIB, KIB, warps=64, programs=32),
    "sm_86": Architecture(99 * KIB, 100 * KIB, KIB, warps=48, programs=16),
    "sm_89": Architecture(99 * KIB, 100 * KIB, KIB, warps=48, programs=24),
    "sm_90": Architecture(227 * KIB, 228 * KIB, KIB, warps=64, programs=32, products="wgmma"),
    "sm_100": Architecture(227 * KIB, 228 * KIB, KIB, warps=64, programs=32, products="tcgen05"),
    "sm_120": Architecture(99 * KIB, 100 * KIB, KIB, warps=48, programs=24),
    "gfx90a": Architecture(64 * KIB, 64 * KIB, 0, 32, 32, "v_mfma", lanes=64, registers=4 * 64 * 512),
    "gfx942": Architecture(64 * KIB, 64 * KIB, 0, 32, 32, "v_mfma", lanes=64, registers=4 * 64 * 512),
    "gfx1100": Architecture(64 * KIB, 128 * KIB, 0, 64, 32, "v_wmma", registers=4 * 32 * 1536, granule=24),
}


class CompilingDriver:
    """Stands in for the driver of a GPU."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self):
        lanes = ARCHITECTURES[self.arch].lanes
        if device.is_amd(self.arch):
            return GPUTarget("hip", self.arch, lanes)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), lanes)

    def get_current_device(self):
        return self.arch  # kernels are cached by device

    def get_current_stream(self, _device):
        return 0


class Launch(NamedTuple):
    """A compiled kernel of Triton's, and the number of programs that it is launched with."""

    kernel: object
    programs: int

    def constant(self, name: str) -> int | None:
        """The value of one of the kernel's constants; None if it has none of this name."""
        source = self.kernel.src
        return {source.fn.arg_names[index]: value for (index,), value in source.constants.items()}.get(name)

    def takes(self, name: str) -> bool:
        """Whether the kernel has an argument of this name."""
        return name in self.kernel.src.fn.arg_names


def compiled(arch: str, launch: Callable[..., None], *arguments: object) -> list[Launch]:
    """The launches that `launch(*arguments)` makes on a GPU of this architecture: compiled, but not launched."""
    launches, run = [], JITFunction.run
    described = device.Device(arch, MULTIPROCESSORS, ARCHITECTURES[arch].lanes)

    def compile_only(self, *args, grid, warmup, **options):
        launches.append(Launch(run(self, *args, grid=grid, warmup=True, **options), prod(grid)))

    driver.set_active(CompilingDriver(arch))
    for module in (attention, bias_gelu, add_norm):
        module.describe = lambda _: described
    JITFunction.run = compile_only
    try:
        launch(*arguments)
    finally:
        JITFunction.run = run
    return launches
