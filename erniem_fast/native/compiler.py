"""The compilers for csrc/, and their command lines."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parents[1] / "csrc"

_CPP = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """A library cannot be built or loaded; the message includes the compiler's output, if any, and the remedy."""


# The flags that ATen itself is compiled with for each CPU capability, so that this machine can run the library.
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


class Recipe(NamedTuple):
    """How a library is compiled: what starts the compiler, its flags, and the files."""

    compiler: list[str]
    flags: list[str]
    sources: list[Path]


def recipe(device: str) -> Recipe:
    """How a device's library is compiled on this machine.

    Raises:
        BuildError: there is no compiler for it.
    """
    return Recipe(cpp() if device == "cpu" else [nvcc_path()], flags(device), sources(device))


def sources(device: str) -> list[Path]:
    """The files that are compiled into a device's library."""
    found = SOURCES.glob({"cpu": "*_cpu.cpp", "cuda": "*_cuda.cu"}[device])
    return sorted(source.resolve() for source in found)


def flags(device: str) -> list[str]:
    """The compiler's flags for the devices of this machine."""
    if device == "cpu":
        return cpu_flags(torch.backends.cpu.get_cpu_capability())
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return cuda_flags(sorted(10 * major + minor for major, minor in found))


def cpu_flags(capability: str) -> list[str]:
    """The C++ compiler's flags for a capability, as named by `torch.backends.cpu.get_cpu_capability`."""
    math = ["-fno-math-errno", "-fno-trapping-math"]
    return ["-std=c++17", "-O3", "-shared", "-fPIC", *math, *_VECTOR_FLAGS.get(capability, [])]


def cuda_flags(architectures: Sequence[int]) -> list[str]:
    """nvcc's flags for compute capabilities, each given as 10 · major + minor."""
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    return ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", *code]


def cpp() -> list[str]:
    """What starts the C++ compiler: CXX, one on the PATH, or that of the package ziglang.

    Raises:
        BuildError: there is none, or CXX names a program that does not exist.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX={os.environ['CXX']!r} names a program that does not exist; correct it or unset it.")
        return named
    found = first_found(_CPP)
    if found is not None:
        return [found]
    if find_spec("ziglang") is not None:
        return zig("-mcpu=baseline")
    raise BuildError(
        f"No C++ compiler was found: looked for $CXX, {', '.join(_CPP)}, and the package ziglang. Install one (`apt "
        f"install g++`), or `pip install ziglang`, which contains a compiler. Without the library every op still runs, "
        f"in PyTorch or Triton."
    )


def zig(*arguments: str) -> list[str]:
    """What starts the C++ compiler of the package ziglang; it optimises for this very machine unless told otherwise."""
    return [sys.executable, "-m", "ziglang", "c++", *arguments]


def nvcc_path() -> str:
    """The path of CUDA's compiler; if there is none, a name that the shell's error will mention."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return first_found([os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)]) or "nvcc"


def first_found(candidates: Sequence[str | None]) -> str | None:
    """The path of the first program that exists; None if none does."""
    return next(filter(None, (shutil.which(candidate) for candidate in candidates if candidate)), None)
