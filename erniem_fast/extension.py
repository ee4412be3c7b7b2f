"""Builds and loads the native libraries of csrc/: one for the CPU, one for CUDA devices.

They have a plain C interface and include nothing of torch, so that a build outlives an upgrade of torch or Python; the
CPU's takes its threads from torch through one function of torch's stable ABI. A library is cached under a name that
says what it depends on: the sources, the compiler's flags and the machine. It is put there in one step when it is
complete, so that processes that build at once cannot disturb each other. Loading it runs code, so neither the library
nor its folder may be another user's or writable by others.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
DEVICES = ("cpu", "cuda")

# ATen's own flags for each of its capabilities, so that the machine that loads a library can run it.
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


class BuildError(RuntimeError):
    """A library cannot be built or loaded; the message has the compiler's own and the remedy."""


def build(devices: Sequence[str] | None = None) -> dict[str, Path]:
    """Compiles what is not in the cache yet; a failure for one device does not keep the other from being built.

    Args:
        devices: of `cpu` and `cuda`; all that are present where it is None.

    Returns:
        The library of each device.

    Raises:
        BuildError: a compiler is missing or fails, or the cache cannot be written or is open to others.
    """
    devices = devices or [device for device in DEVICES if _absence(device) is None]
    for device in devices:
        _check_presence(device)
    libraries = {device: library(device) for device in devices}
    missing = [device for device, path in libraries.items() if _trusted(path) is None]
    if missing:
        compile_libraries({libraries[device]: _command(device) for device in missing})
    return libraries


def load(device: str) -> ctypes.CDLL:
    """The library of a device, from the cache.

    Raises:
        BuildError: it is not built, does not load, or may be another user's.
    """
    path = library(device)
    if path not in _opened:
        _check_presence(device)
        trusted = _trusted(path)
        if trusted is None:
            raise BuildError("it is not built; run `python -m erniem_fast build`.")
        _opened[path] = _open(trusted)
    return _opened[path]


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
    return str(library(device))


@functools.cache
def library(device: str) -> Path:
    """Where the cache keeps, or would keep, the library that this process can use."""
    digest = hashlib.sha256(shlex.join([platform.system(), platform.machine(), *_flags(device)]).encode())
    for source in sorted(SOURCES.iterdir()):
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
        raise BuildError(f"there is no folder for the cache: {error} {_OTHER_CACHE}") from error


def compile_libraries(commands: dict[Path, list[str]]) -> None:
    """Runs the compilers side by side, each told by `-o` where to write, and moves what they made to the paths.

    Args:
        commands: the compiler's command line for each path, without the output.

    Raises:
        BuildError: with the compiler's output.
    """
    try:
        cache().mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_trust(cache())
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            rules = (_ninja_rule(path.name, command) for path, command in commands.items())
            Path(folder, "build.ninja").write_text("".join(rules))
            ninja = subprocess.run(
                [_ninja_path(), "-C", folder, "-k", "0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                umask=0o022,  # others may not write to the libraries
            )
            for path in commands:
                if Path(folder, path.name).exists():
                    os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise BuildError(f"the cache cannot be written: {error}. {_OTHER_CACHE}") from error
    if ninja.returncode != 0:
        raise BuildError(f"the compiler failed:\n{ninja.stdout}\n{_REQUIREMENTS}")


def _ninja_rule(name: str, command: list[str]) -> str:
    line = shlex.join(command).replace("$", "$$")
    return f"rule {name}\n  command = {line} -o $out\nbuild {name}: {name}\n"


_OTHER_CACHE = "Set XDG_CACHE_HOME to a folder of your own, and run `python -m erniem_fast build`."

_REQUIREMENTS = (
    "The CPU's library needs a C++17 compiler (GCC 9, Clang 10 or newer; `apt install g++`, or name one in CXX), that "
    "of CUDA also nvcc 11.8 or newer (the `cuda-nvcc` and `cuda-cudart-dev` packages, or name one in CUDACXX). Without "
    "them the embeddings run in plain PyTorch."
)


def _command(device: str) -> list[str]:
    sources = sorted(SOURCES.glob({"cpu": "*_cpu.cpp", "cuda": "*_cuda.cu"}[device]))
    compiler = compiler_path() if device == "cpu" else nvcc_path()
    return [compiler, *_flags(device), *(str(source.resolve()) for source in sources)]


def _flags(device: str) -> list[str]:
    if device == "cpu":
        return cpu_flags(torch.backends.cpu.get_cpu_capability())
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return cuda_flags(sorted(10 * major + minor for major, minor in found))


def cpu_flags(capability: str) -> list[str]:
    """The C++ compiler's flags for a capability as `torch.backends.cpu.get_cpu_capability` names it."""
    math = ["-fno-math-errno", "-fno-trapping-math"]
    return ["-std=c++17", "-O3", "-shared", "-fPIC", *math, *_VECTOR_FLAGS.get(capability, [])]


def cuda_flags(architectures: Sequence[int]) -> list[str]:
    """nvcc's flags for compute capabilities, each ten times the major plus the minor version."""
    code = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    return ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", *code]


_opened: dict[Path, ctypes.CDLL] = {}


def _trusted(path: Path) -> Path | None:
    """Where a library really lies, links followed; None where it is not built.

    The folders further up need no check: others who may write there can put a folder in the place of the library's, but
    not one that is the user's.

    Raises:
        BuildError: the library or its folder cannot be read, or others may have written to it.
    """
    try:
        path = Path(os.path.realpath(path, strict=True))
        _check_trust(path.parent)
        _check_trust(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BuildError(f"the cache cannot be read: {error}. {_OTHER_CACHE}") from error
    return path


def _check_trust(path: Path) -> None:
    """Refuses a folder or library that another user owns, root excepted, or may write to."""
    found, user = path.stat(), os.geteuid()
    if found.st_uid not in (user, 0):
        fault, remedy = f"belongs to user {found.st_uid}, not to you (user {user})", f"chown {user}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault, remedy = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):03o})", "chmod go-w"
    else:
        return
    raise BuildError(
        f"{path} {fault}, so it may hold code that is not yours. Where you trust all that it holds, run "
        f"`{remedy} {shlex.quote(str(path))}`; else: {_OTHER_CACHE}"
    )


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}. Delete it and run `python -m erniem_fast build`.") from error


def _check_presence(device: str) -> None:
    reason = _absence(device)
    if reason is not None:
        raise BuildError(reason)


def _absence(device: str) -> str | None:
    """Why a device cannot have a library here, whatever is installed."""
    if sys.platform == "win32":
        return "there is no native library for Windows; the embeddings run in plain PyTorch."
    if device == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return "torch finds no CUDA device."
    return None


def compiler_path() -> str:
    """The C++ compiler, or a name that the shell will not find."""
    return _first_found([os.environ.get("CXX"), "c++", "g++", "clang++"]) or "c++"


def nvcc_path() -> str:
    """CUDA's compiler, or a name that the shell will not find."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return _first_found([os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)]) or "nvcc"


def _ninja_path() -> str:
    found = _first_found(["ninja", str(Path(sys.executable).with_name("ninja"))])
    if found is None:
        raise BuildError("no ninja found, which starts the compilers; `pip install ninja`.")
    return found


def _first_found(candidates: Sequence[str | None]) -> str | None:
    return next(filter(None, (shutil.which(each) for each in candidates if each)), None)
