"""Compiles csrc/ into the cache.

A library is put there in one step when it is complete, so that processes that build at once cannot disturb each other.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import compiler, library
from .library import BuildError

_REQUIREMENTS = (
    "The CPU's library needs a C++17 compiler (GCC 9, Clang 10 or newer; `apt install g++`, or name one in CXX), that "
    "of CUDA also nvcc 11.8 or newer (the `cuda-nvcc` and `cuda-cudart-dev` packages, or name one in CUDACXX). Without "
    "them the embeddings run in plain PyTorch."
)


def build(devices: Sequence[str] | None = None) -> dict[str, Path]:
    """Compiles the libraries that are not in the cache yet; one that fails does not keep the other from being built.

    Args:
        devices: of `cpu` and `cuda`; all that are present where it is None.

    Returns:
        The library of each device.

    Raises:
        BuildError: a compiler is missing or fails, or the cache cannot be written or is open to others.
    """
    devices = devices or [device for device in library.DEVICES if library.absence(device) is None]
    for device in devices:
        library.check_presence(device)
    paths = {device: library.path(device) for device in devices}
    missing = [device for device, path in paths.items() if library.trusted(path) is None]
    if missing:
        compile_libraries({paths[device]: compiler.command(device) for device in missing})
    return paths


def compile_libraries(commands: dict[Path, list[str]]) -> None:
    """Runs the compilers side by side, each with an `-o` that says where to write, and moves the results to the paths.

    Args:
        commands: the compiler's command line for each path, without the output.

    Raises:
        BuildError: with the compiler's output.
    """
    cache = library.cache()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        library.check_trust(cache)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
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
        raise BuildError(f"the cache cannot be written: {error}. {library.OTHER_CACHE}") from error
    if ninja.returncode != 0:
        raise BuildError(f"the compiler failed:\n{ninja.stdout}\n{_REQUIREMENTS}")


def _ninja_rule(name: str, command: list[str]) -> str:
    line = shlex.join(command).replace("$", "$$")
    return f"rule {name}\n  command = {line} -o $out\nbuild {name}: {name}\n"


def _ninja_path() -> str:
    found = compiler.first_found(["ninja", str(Path(sys.executable).with_name("ninja"))])
    if found is None:
        raise BuildError("no ninja found, which starts the compilers; `pip install ninja`.")
    return found
