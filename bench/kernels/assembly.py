"""Registers, spills, instructions and widths of a compiled kernel, read from its assembly."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from erniem_fast.kernels.device import is_amd


def of_kernel(arch: str, kernel) -> dict[str, int | str]:
    """A row's figures of a kernel that Triton has compiled for an architecture."""
    return of_amdgcn(kernel.asm["amdgcn"]) if is_amd(arch) else of_ptx(kernel.asm["ptx"], kernel.asm["cubin"])


def of_ptx(ptx: str, cubin: bytes) -> dict[str, int | str]:
    """A row's figures of what was compiled for one of NVIDIA's."""
    registers, stack, local = resource_usage(cubin)
    return {
        "registers": registers,
        "spills": stack + local,
        "products": next((name for name in ("wgmma", "tcgen05", "mma.sync") if name + "." in ptx), "-"),
        "loads": 16 if "cp.async.cg" in ptx else widest(r"ld\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx),
        "stores": widest(r"st\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx),
    }


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, and bytes of stack and of local memory, of a thread."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    return int(found[1]), int(found[2]), int(found[3])


def of_amdgcn(assembly: str) -> dict[str, int | str]:
    """A row's figures of what was compiled for one of AMD's."""

    def figure(name: str) -> int:
        return int(re.search(rf"{name}: +(\d+)", assembly)[1])

    width = r"(?:dword(?:x(\d))?|b(\d+))\b"  # as gfx9 and gfx11 call it
    return {
        "registers": figure(".vgpr_count"),
        "spills": max(figure("ScratchSize"), 4 * figure(".vgpr_spill_count")),
        "products": next((name for name in ("v_mfma", "v_wmma") if name in assembly), "-"),
        "loads": widest(rf"(?:buffer|global)_load_{width}", assembly),
        "stores": widest(rf"(?:buffer|global)_store_{width}", assembly),
    }


def widest(instruction: str, assembly: str) -> int:
    """The bytes that the widest of these instructions moves; a match has a count of elements and the bits of one."""
    found = re.findall(instruction, assembly)
    return max((int(count or 1) * int(bits or 32) // 8 for count, bits in found), default=0)
