"""The built libraries: where they are, whether they can be trusted, and loading them.

A wheel can bring libraries; all others are in the cache. A library's file name contains a digest of everything it
depends on: the sources, the compiler's flags and the machine. Loading a library runs its code, so neither a library in
the cache nor its folder may belong to another user or be writable by others.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import compiler
from .compiler import BuildError

DEVICES = ("cpu", "cuda")

# Those that a wheel brings, see `native/wheel.py`.
SHIPPED = Path(__file__).parents[1] / "libraries"

NOT_BUILT = "the native library is not built; run `python -m erniem_fast build`."
OTHER_CACHE = "Set XDG_CACHE_HOME to a folder of your own, and run `python -m erniem_fast build`."

_opened: dict[Path, ctypes.CDLL] = {}


def load(device: str) -> ctypes.CDLL:
    """The library of a device type, `cpu` or `cuda`, from the wheel or the cache.

    Raises:
        BuildError: this machine lacks the device; or the library is not built, does not load, or may have been written
            by others.
    """
    found = path(device)
    if found not in _opened:
        check_presence(device)
        real = trusted(found)
        if real is None:
            raise BuildError(NOT_BUILT)
        _opened[found] = _open(real)
    return _opened[found]


def is_built(device: str) -> bool:
    """Whether `load` succeeds."""
    try:
        load(device)
    except BuildError:
        return False
    return True


def status() -> dict[str, str]:
    """For each device type, the library's path, or why there is none and what to do."""
    return {device: _status(device) for device in DEVICES}


def _status(device: str) -> str:
    try:
        load(device)
    except BuildError as error:
        return str(error)
    return str(path(device))


@functools.cache
def path(device: str) -> Path:
    """The path of the library for this process: the wheel's if it has one, else one in the cache, built or not.

    Raises:
        BuildError: the user has no home folder.
    """
    name = file_name(device, platform.machine(), compiler.flags(device))
    shipped = SHIPPED / name
    return shipped if shipped.exists() else cache() / name


def file_name(device: str, machine: str, flags: Sequence[str]) -> str:
    """The name of a library, from what it depends on.

    Args:
        device: `cpu` or `cuda`.
        machine: as `platform.machine()` names it.
        flags: the compiler's.
    """
    digest = hashlib.sha256(shlex.join([platform.system(), machine, *flags]).encode())
    for source in sorted(compiler.SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"native_{device}-{digest.hexdigest()[:16]}.so"


def cache() -> Path:
    """The folder of the built libraries.

    Raises:
        BuildError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "erniem_fast"
    except RuntimeError as error:
        raise BuildError(f"there is no folder for the cache: {error} {OTHER_CACHE}") from error


def has_others(device: str) -> bool:
    """Whether the cache has libraries of other versions, processors or flags than this process needs.

    Raises:
        BuildError: the user has no home folder.
    """
    return any(each.name != path(device).name for each in cache().glob(f"native_{device}-*.so"))


def trusted(library: Path) -> Path | None:
    """The real path of a library, with links resolved; None if it is not built.

    One that a wheel brought is as trustworthy as this file. Folders further up need no check: another user who may
    write there can replace the library's folder, but the new folder does not belong to this user, and so is refused.

    Raises:
        BuildError: the library or its folder cannot be read, or others may have written to it.
    """
    if library.parent == SHIPPED:
        return library
    try:
        real = Path(os.path.realpath(library, strict=True))
        check_trust(real.parent)
        check_trust(real)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BuildError(f"the cache cannot be read: {error}. {OTHER_CACHE}") from error
    return real


def check_trust(path: Path) -> None:
    """Refuses a folder or library that belongs to another user (except root) or that others may write to.

    Raises:
        BuildError: the message names the path, its owner or mode, and the remedy.
    """
    found, user = path.stat(), os.geteuid() if hasattr(os, "geteuid") else 0  # Windows has no numbers of users
    if found.st_uid not in (user, 0):
        fault, remedy = f"belongs to user {found.st_uid}, not to you (user {user})", f"chown {user}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault, remedy = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):03o})", "chmod go-w"
    else:
        return
    raise BuildError(
        f"{path} {fault}, so it may hold code that is not yours. If you trust everything in it, run "
        f"`{remedy} {shlex.quote(str(path))}`; else: {OTHER_CACHE}"
    )


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}. Delete it and run `python -m erniem_fast build`.") from error


def check_presence(device: str) -> None:
    """Refuses a device that cannot have a library on this machine.

    Raises:
        BuildError: the message says why.
    """
    reason = absence(device)
    if reason is not None:
        raise BuildError(reason)


def absence(device: str) -> str | None:
    """Why a device cannot have a library on this machine, whatever is installed; None if it can."""
    if sys.platform == "win32":
        return "there is no native library for Windows; the ops run in PyTorch or Triton."
    if device == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "torch finds no CUDA device."
    return None
