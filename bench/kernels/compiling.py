"""Compiles the kernels for an architecture that is not here.

The launches are the kernels' own: only the driver is replaced, by one that names the architecture, and the launch
itself, by compilation. So configurations, argument types and alignment are what a GPU of that kind would get.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
        products: the instruction that multiplies matrices of 16-bit numbers.
        lanes: threads of a warp.
    """

    shared: int
    products: str = "mma.sync"
    lanes: int = 32


ARCHITECTURES = {
    "sm_75": Architecture(64 * KIB),
    "sm_80": Architecture(163 * KIB),
    "sm_86": Architecture(99 * KIB),
    "sm_89": Architecture(99 * KIB),
    "sm_90": Architecture(227 * KIB, "wgmma"),
    "sm_100": Architecture(227 * KIB, "tcgen05"),
    "sm_120": Architecture(99 * KIB),
    "gfx90a": Architecture(64 * KIB, "v_mfma", lanes=64),
    "gfx942": Architecture(64 * KIB, "v_mfma", lanes=64),
    "gfx1100": Architecture(64 * KIB, "v_wmma"),
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


def compiled(arch: str, launch: Callable[..., None], *arguments: object) -> list:
    """The kernels that `launch(*arguments)` launches on a GPU of this architecture, compiled and not launched."""
    kernels, run = [], JITFunction.run
    described = device.Device(arch, MULTIPROCESSORS, ARCHITECTURES[arch].lanes)

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(CompilingDriver(arch))
    for module in (attention, bias_gelu, add_norm):
        module.describe = lambda _: described
    JITFunction.run = compile_only
    try:
        launch(*arguments)
    finally:
        JITFunction.run = run
    return kernels
