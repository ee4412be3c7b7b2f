"""Peak resident memory of this process, for one piece of work where the system lets a process forget its old peak."""

import contextlib
import ctypes
import gc
import pathlib
import resource
import sys

CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")
STATUS = pathlib.Path("/proc/self/status")


def reset_peak():
    """Start a new peak at what is resident now (Linux); elsewhere the peak stays that of the process so far.

    Freed memory that the C library holds back is returned first, so that no earlier work counts in the new peak.
    """
    gc.collect()
    if not CLEAR_REFS.exists():
        return
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")


def peak():
    """Largest resident memory since the last reset, in bytes; code and the pages of mapped files count too."""
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
