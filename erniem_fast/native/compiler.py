"""The compilers of csrc/, and the command lines that they are started with."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[1] / "csrc"

# ATen's own flags for each of its capabilities, so that the machine that loads a library can run it.
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


def command(device: str) -> list[str]:
    """The command line that compiles a device's library, without the output."""
    sources = sorted(SOURCES.glob({"cpu": "*_cpu.cpp", "cuda": "*_cuda.cu"}[device]))
    compiler = compiler_path() if device == "cpu" else nvcc_path()
    return [compiler, *flags(device), *(str(source.resolve()) for source in sources)]


def flags(device: str) -> list[str]:
    """The compiler's flags for the devices of this machine."""
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


def compiler_path() -> str:
    """The C++ compiler, or a name that the shell will not find."""
    return first_found([os.environ.get("CXX"), "c++", "g++", "clang++"]) or "c++"


def nvcc_path() -> str:
    """CUDA's compiler, or a name that the shell will not find."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return first_found([os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)]) or "nvcc"


def first_found(candidates: Sequence[str | None]) -> str | None:
    """The path of the first program that exists."""
    return next(filter(None, (shutil.which(each) for each in candidates if each)), None)
