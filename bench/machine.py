"""What the figures were measured on; no name of the machine or its user."""

import os
import pathlib
import platform
import re

import psutil
import torch


def describe(device):
    """Names and sizes of what matters for speed, ready for JSON.

    Args:
        device: the torch device that is measured.
    """
    device = torch.device(device)
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(),
    }


def slug(machine):
    """A folder name for this machine, as in "intel-xeon-processor-2-cores"."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def available_cores():
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count()
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def _cpu_name():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
