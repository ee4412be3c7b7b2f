"""Wheels with the CPU's libraries inside, so that their users need no compiler: `python -m erniem_fast.native.wheel`.

The compiler of the package ziglang links with an old glibc, and compiles for other machines than this one.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from . import compiler, library
from .build import compile_libraries
from .compiler import Recipe

_GLIBC = (2, 28)  # which torch's own wheels need too

# The capabilities, as torch names them, that a machine's wheel has a library for. On others PyTorch runs the ops until
# `python -m erniem_fast build`. On Arm the compiler's flags do not depend on the capability.
CAPABILITIES = {"x86_64": ("AVX2", "AVX512"), "aarch64": ("DEFAULT",)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erniem_fast.native.wheel", description=__doc__)
    parser.add_argument("wheel", type=Path, help="a wheel for every machine; the others go into its folder")
    pure = parser.parse_args().wheel
    for machine in CAPABILITIES:
        print(f"{machine}: compiling", flush=True)
        print(add_libraries(pure, machine))


def add_libraries(pure: Path, machine: str) -> Path:
    """Makes the wheel for one kind of machine.

    Args:
        pure: the wheel without libraries.
        machine: a key of `CAPABILITIES`.

    Returns:
        The new wheel's path, beside `pure`.

    Raises:
        BuildError: the compiler fails.
        subprocess.CalledProcessError: the package `wheel` fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        _wheel("unpack", "--dest", folder, pure)
        (unpacked,) = Path(folder).iterdir()
        compile_libraries(recipes(unpacked / "erniem_fast" / library.SHIPPED.name, machine))
        (facts,) = unpacked.glob("*.dist-info/WHEEL")
        facts.write_text(facts.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false"))
        _wheel("pack", "--dest-dir", folder, unpacked)
        platform = f"manylinux_{_GLIBC[0]}_{_GLIBC[1]}_{machine}"
        name = _wheel("tags", "--platform-tag", platform, Path(folder, pure.name)).split()[-1]
        return Path(folder, name).replace(pure.with_name(name))


def recipes(folder: Path, machine: str) -> dict[Path, Recipe]:
    """How each library of a machine is compiled, by the library's path."""
    zig = compiler.zig("-target", f"{machine}-linux-gnu.{_GLIBC[0]}.{_GLIBC[1]}", "-s")
    flags = map(compiler.cpu_flags, CAPABILITIES[machine])
    return {
        folder / library.file_name("cpu", machine, each): Recipe(zig, each, compiler.sources("cpu")) for each in flags
    }


def _wheel(*arguments: str | Path) -> str:
    """What a command of the package `wheel` prints."""
    return subprocess.run(
        [sys.executable, "-m", "wheel", *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    main()
