"""The built libraries in the cache: where they are, whether they can be trusted, and loading them.

A library's name in the cache has a digest of all that it depends on: the sources, the compiler's flags and the machine.
Loading it runs code, so neither the library nor its folder may be another user's or writable by others.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import stat
import sys
from pathlib import Path

import torch

from . import compiler

DEVICES = ("cpu", "cuda")

OTHER_CACHE = "Set XDG_CACHE_HOME to a folder of your own, and run `python -m erniem_fast build`."

_opened: dict[Path, ctypes.CDLL] = {}


class BuildError(RuntimeError):
    """A library cannot be built or loaded; the message has the compiler's own and the remedy."""


def load(device: str) -> ctypes.CDLL:
    """The library of a device, from the cache.

    Raises:
        BuildError: it is not built, does not load, or may be another user's.
    """
    found = path(device)
    if found not in _opened:
        check_presence(device)
        real = trusted(found)
        if real is None:
            raise BuildError("it is not built; run `python -m erniem_fast build`.")
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
    """For each device, the library's path, or why there is none and what to do."""
    return {device: _status(device) for device in DEVICES}


def _status(device: str) -> str:
    try:
        load(device)
    except BuildError as error:
        return str(error)
    return str(path(device))


@functools.cache
def path(device: str) -> Path:
    """Where the cache keeps, or would keep, the library that this process can use."""
    digest = hashlib.sha256(shlex.join([platform.system(), platform.machine(), *compiler.flags(device)]).encode())
    for source in sorted(compiler.SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return cache() / f"native_{device}-{digest.hexdigest()[:16]}.so"


def cache() -> Path:
    """The folder of the built libraries.

    Raises:
        BuildError: the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "erniem_fast"
    except RuntimeError as error:
        raise BuildError(f"there is no folder for the cache: {error} {OTHER_CACHE}") from error


def trusted(library: Path) -> Path | None:
    """The real path of a library, links followed; None if it is not built.

    The folders further up need no check: others who may write there can put a folder in the place of the library's, but
    not one that is the user's.

    Raises:
        BuildError: the library or its folder cannot be read, or others may have written to it.
    """
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
    """Refuses a folder or library that another user owns, root excepted, or may write to.

    Raises:
        BuildError: says whose it is, and the remedy.
    """
    found, user = path.stat(), os.geteuid()
    if found.st_uid not in (user, 0):
        fault, remedy = f"belongs to user {found.st_uid}, not to you (user {user})", f"chown {user}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault, remedy = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):03o})", "chmod go-w"
    else:
        return
    raise BuildError(
        f"{path} {fault}, so it may hold code that is not yours. Where you trust all that it holds, run "
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
        BuildError: says why.
    """
    reason = absence(device)
    if reason is not None:
        raise BuildError(reason)


def absence(device: str) -> str | None:
    """Why a device cannot have a library on this machine, whatever is installed; None if it can."""
    if sys.platform == "win32":
        return "there is no native library for Windows; the embeddings run in plain PyTorch."
    if device == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "torch finds no CUDA device."
    return None
