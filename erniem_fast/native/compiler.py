"""The compilers for csrc/, and their command lines."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[1] / "csrc"

# The flags that ATen itself is compiled with for each CPU capability, so that this machine can run the library.
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


def command(device: str) -> list[str]:
    """The command line that compiles a device's library, without `-o`."""
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
    """The C++ compiler's flags for a capability, as named by `torch.backends.cpu.get_cpu_capability`."""
    math = ["-fno-math-errno", "-fno-trapping-math"]
    return ["-std=c++17", "-O3", "-shared", "-fPIC", *math, *_VECTOR_FLAGS.get(capability, [])]


def cuda_flags(architectures: Sequence[int]) -> list[str]:
    """nvcc's flags for compute capabilities, each given as 10 · major + minor."""
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    return ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", *code]


def compiler_path() -> str:
    """The path of the C++ compiler; if there is none, a name that the shell's error will mention."""
    return first_found([os.environ.get("CXX"), "c++", "g++", "clang++"]) or "c++"


def nvcc_path() -> str:
    """The path of CUDA's compiler; if there is none, a name that the shell's error will mention."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return first_found([os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes)]) or "nvcc"


def first_found(candidates: Sequence[str | None]) -> str | None:
    """The path of the first program that exists; None if none does."""
    return next(filter(None, (shutil.which(candidate) for candidate in candidates if candidate)), None)
