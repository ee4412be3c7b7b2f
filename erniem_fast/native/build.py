"""Compiles csrc/.

A finished library is moved to its place in one step, so that processes that build at the same time cannot disturb each
other.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import compiler, library
from .compiler import BuildError

_REQUIREMENTS = (
    "The CPU library needs a C++17 compiler (GCC 9, Clang 10 or newer; `apt install g++`, or name one in CXX). The "
    "CUDA library also needs nvcc 11.8 or newer (the `cuda-nvcc` and `cuda-cudart-dev` packages, or name one in "
    "CUDACXX). Without the libraries every op still runs, in PyTorch or Triton."
)


def build(devices: Sequence[str] | None = None) -> dict[str, Path]:
    """Compiles the libraries that are missing. If one fails, the other is still built.

    Args:
        devices: `cpu`, `cuda` or both; None for all that this machine has.

    Returns:
        The path of each device's library.

    Raises:
        BuildError: this machine lacks a device; a compiler is missing or fails; or the cache cannot be written or is
            open to others.
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
    """Runs the compilers in parallel, in a temporary folder, and moves the finished libraries to their paths.

    Args:
        commands: the compiler's command line for each path, without `-o`; all paths are in one folder.

    Raises:
        BuildError: a compiler fails, and its output is in the message; ninja is missing; or the folder cannot be
            written to or is open to others.
    """
    (target,) = {path.parent for path in commands}
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        library.check_trust(target)
        with tempfile.TemporaryDirectory(dir=target) as folder:
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
        raise BuildError(f"{target} cannot be written to: {error}. {library.OTHER_CACHE}") from error
    if ninja.returncode != 0:
        raise BuildError(f"the compiler failed:\n{ninja.stdout}\n{_REQUIREMENTS}")


def _ninja_rule(name: str, command: list[str]) -> str:
    line = shlex.join(command).replace("$", "$$")
    return f"rule {name}\n  command = {line} -o $out\nbuild {name}: {name}\n"


def _ninja_path() -> str:
    found = compiler.first_found(["ninja", str(Path(sys.executable).with_name("ninja"))])
    if found is None:
        raise BuildError("there is no ninja to start the compilers; run `pip install ninja`.")
    return found
