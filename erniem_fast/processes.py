"""What concerns a process as a whole when it runs a model: a line of the log if kernels are missing, and forks."""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from . import flags, modes
from .native import library
from .ops.choose import missing

_LOG = logging.getLogger(__name__)

_silent: ContextVar[bool] = ContextVar("erniem_fast_silent", default=False)
_settled: set[str] = set()  # the types of devices for which there is nothing left to tell


class _State:
    """Of this process.

    Attributes:
        computes: whether it, or a process that it was forked from, has run a model on the CPU.
        lost_threads: how many threads it had to give up when it was forked, until the log says so.
    """

    computes = False
    lost_threads = 0


@torch.compiler.assume_constant_result  # graphs of torch.compile do not contain this
def model_runs(device: torch.device) -> None:
    """To be called before a model's layers run on a device."""
    if device.type == "cpu":
        _State.computes = True
    if _State.lost_threads:
        _tell_fork(_State.lost_threads)
        _State.lost_threads = 0
    if device.type not in _settled and not modes.is_exported():
        _tell_missing(device)


def _tell_fork(threads: int) -> None:
    if _speaks():
        _LOG.warning(
            "This process was forked from one that had run a model on %d threads. OpenMP cannot start threads here, so "
            "it computes on one. Start processes by multiprocessing's `spawn` or `forkserver` to use more.",
            threads,
        )


def _tell_missing(device: torch.device) -> None:
    """Logs once why PyTorch runs ops that kernels could run; not if a flag chose so."""
    if _silent.get():
        return
    can_have_kernels = device.type in library.DEVICES and library.absence(device.type) is None
    reasons = missing(device) if can_have_kernels else {}
    if reasons and _speaks():
        ops, why = ", ".join(reasons), " ".join(dict.fromkeys(reasons.values()))
        _LOG.warning("PyTorch runs %s, slower than kernels of erniem_fast would on %s: %s", ops, device.type, why)
    if reasons or not can_have_kernels or flags.read(flags.KERNELS) == "auto":
        _settled.add(device.type)


def _speaks() -> bool:
    """Whether this process logs for all that were started with it: pools and launchers start hundreds."""
    is_first = multiprocessing.parent_process() is None or multiprocessing.current_process().name.endswith("-1")
    return is_first and os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def silent() -> Iterator[None]:
    """Inside a `with` block models run without a line about missing kernels, which a later run may log."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def _mend_threads() -> None:
    """Lets a forked process compute on one thread if its parent has used several: GNU's OpenMP waits for them forever.

    A child whose parent has not computed can start threads of its own. So can others where OpenMP is LLVM's or Intel's.
    """
    threads = torch.get_num_threads()
    if _State.computes and threads > 1 and _has_gnu_openmp():
        torch.set_num_threads(1)
        _State.lost_threads = threads


def _has_gnu_openmp() -> bool:
    try:
        return "/libgomp" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mend_threads)
