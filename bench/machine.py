"""The machine that figures are measured on, without its name or its user's."""

import dataclasses
import os
import pathlib
import platform
import re

import psutil
import torch

CPUINFO = pathlib.Path("/proc/cpuinfo")
# AMD's microarchitectures by family, and by the first model number of a range, as Linux tells them apart
# (arch/x86/kernel/cpu/amd.c). In virtual machines the name of the processor is often only "AMD EPYC".
_AMD = {
    25: {0x00: "Zen 3", 0x10: "Zen 4", 0x20: "Zen 3", 0x60: "Zen 4"},
    26: {0x00: "Zen 5", 0x50: "Zen 6", 0x60: "Zen 5", 0x80: "Zen 6"},
}
PRODUCT_INSTRUCTIONS = ("avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What matters for speed.

    Attributes:
        cpu: its model.
        cores: physical cores that this process may use.
        instructions: the widest vector instructions that PyTorch uses, as "AVX2".
        memory_gib: main memory.
        gpu: its model; None where a CPU is measured.
        system: as "Linux".
        product_instructions: for products of 8 and 16 bits, as "AVX512_VNNI", whether PyTorch uses them or not; None
            where the system does not tell, and in older results.
    """

    cpu: str
    cores: int
    instructions: str
    memory_gib: int
    gpu: str | None
    system: str
    product_instructions: list[str] | None = None

    @property
    def slug(self) -> str:
        """A folder name, as in "intel-xeon-processor-2-cores"."""
        name = self.gpu or f"{self.cpu} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def describe(device: torch.device | str) -> Machine:
    """This machine, to be measured on `device`."""
    device = torch.device(device)
    return Machine(
        cpu=cpu_name(CPUINFO.read_text()) if CPUINFO.exists() else platform.processor() or platform.machine(),
        cores=available_cores(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        system=platform.system(),
        product_instructions=product_instructions(CPUINFO.read_text()) if CPUINFO.exists() else None,
    )


def available_cores() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count()
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    return psutil.virtual_memory().available


def product_instructions(cpuinfo: str) -> list[str] | None:
    """Those of PRODUCT_INSTRUCTIONS that the text of /proc/cpuinfo names."""
    flags = re.search(r"^(flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)  # the latter is Arm's
    return [name.upper() for name in PRODUCT_INSTRUCTIONS if name in flags[2].split()] if flags else None


def cpu_name(cpuinfo: str) -> str:
    """The processor that the text of /proc/cpuinfo names, as in "AMD EPYC (Zen 5)"."""
    values = dict(re.findall(r"^(\w[\w ]*?)\s*:\s*(.+)$", cpuinfo, re.MULTILINE))
    name = values.get("model name", platform.machine())
    if values.get("vendor_id") != "AuthenticAMD":
        return name
    ranges = _AMD.get(int(values["cpu family"]))
    if ranges is None:
        return name
    return f"{name} ({ranges[max(first for first in ranges if first <= int(values['model']))]})"
