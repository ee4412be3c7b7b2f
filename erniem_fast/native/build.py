"""Compiles csrc/.

A finished library is moved to its place in one step, so that processes that build at the same time cannot disturb each
other.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from . import compiler, library
from .compiler import BuildError, Recipe

_REQUIREMENTS = (
    "The CPU library needs a C++17 compiler (GCC 9, Clang 10 or newer; `apt install g++`, `pip install ziglang`, or "
    "name one in CXX). The CUDA library also needs nvcc 11.8 or newer (the `cuda-nvcc` and `cuda-cudart-dev` packages, "
    "or name one in CUDACXX). Without the libraries every op still runs, in PyTorch or Triton."
)

# That g++ 12 needs for the CPU's library on one core of an EPYC (Zen 5); its files are compiled in parallel.
SECONDS = 17


def _say_nothing(line: str) -> None:
    pass


def build(devices: Sequence[str] | None = None, report: Callable[[str], None] = _say_nothing) -> dict[str, Path]:
    """Compiles the libraries that are missing. If one fails, the other is still built.

    Args:
        devices: `cpu`, `cuda` or both; None for all that this machine has.
        report: takes a line about the progress.

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
        recipes = {paths[device]: compiler.recipe(device) for device in missing}
        report(f"compiling for {' and '.join(missing)}: one core takes about {SECONDS} s")
        compile_libraries(recipes, report)
    return paths


def objection() -> str | None:
    """Why the CPU's library cannot be built here, with the remedy; None if nothing is known to keep it from being."""
    try:
        library.check_presence("cpu")
        compiler.cpp()
        _ninja_path()
        folder = library.cache()
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            return f"{folder} cannot be written to. {library.OTHER_CACHE}"
        if existing == folder:
            library.check_trust(folder)
    except BuildError as error:
        return str(error)
    return None


def compile_libraries(recipes: dict[Path, Recipe], report: Callable[[str], None] = _say_nothing) -> None:
    """Runs the compilers in parallel, in a temporary folder, and moves the finished libraries to their paths.

    Args:
        recipes: how to compile the library of each path; all paths are in one folder.
        report: takes a line about each finished file.

    Raises:
        BuildError: a compiler fails, and its output is in the message; ninja is missing; or the folder cannot be
            written to or is open to others.
    """
    (target,) = {path.parent for path in recipes}
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        library.check_trust(target)
        with tempfile.TemporaryDirectory(dir=target) as folder:
            rules = (_ninja_rules(path.name, recipe) for path, recipe in recipes.items())
            Path(folder, "build.ninja").write_text("".join(rules))
            status, output = _run_ninja(folder, report)
            for path in recipes:
                if Path(folder, path.name).exists():
                    os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise BuildError(f"{target} cannot be written to: {error}. {library.OTHER_CACHE}") from error
    if status != 0:
        raise BuildError(f"the compiler failed:\n{output}\n{_REQUIREMENTS}")


def _run_ninja(folder: str, report: Callable[[str], None]) -> tuple[int, str]:
    """The exit status, and all that ninja and the compilers print."""
    command, lines = [_ninja_path(), "-C", folder, "-k", "0"], []
    # With this mask, others may not write to the libraries.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, umask=0o022) as ninja:
        for line in ninja.stdout:
            lines.append(line)
            if re.match(r"\[\d+/\d+\] ", line):
                report(line.rstrip())
    return ninja.returncode, "".join(lines)


def _ninja_rules(name: str, recipe: Recipe) -> str:
    """What tells ninja to compile a library: several sources by a process each, one source to the library at once."""
    to_library = shlex.join([*recipe.compiler, *recipe.flags])
    to_object = shlex.join([*recipe.compiler, *(flag for flag in recipe.flags if flag != "-shared"), "-c"])
    rules = _ninja_rule(f"{name}-library", to_library) + _ninja_rule(f"{name}-object", to_object)
    parts = recipe.sources
    if len(recipe.sources) > 1:
        parts = [Path(f"{name}-{source.stem}.o") for source in recipe.sources]
        for part, source in zip(parts, recipe.sources, strict=True):
            rules += _ninja_build(part, f"{name}-object", [source])
    return rules + _ninja_build(Path(name), f"{name}-library", parts)


def _ninja_rule(name: str, command: str) -> str:
    return f"rule {name}\n  command = {command.replace('$', '$$')} $in -o $out\n  description = $file\n"


def _ninja_build(path: Path, rule: str, parts: Sequence[Path]) -> str:
    escaped = (re.sub("[$ :]", r"$\g<0>", str(part)) for part in parts)
    file = parts[0].name if len(parts) == 1 else path.name
    return f"build {path}: {rule} {' '.join(escaped)}\n  file = {file}\n"


def _ninja_path() -> str:
    found = compiler.first_found(["ninja", str(Path(sys.executable).with_name("ninja"))])
    if found is None:
        raise BuildError("there is no ninja to start the compilers; run `pip install ninja`.")
    return found
