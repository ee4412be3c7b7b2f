"""Compiles the kernels as they are launched, for every architecture and without a GPU, and tables what came out.

Prints the kernels that break a rule, and writes bench/results/codegen.md. The exit code is 1 if there are any.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from math import inf
from pathlib import Path

# Before the first import of Triton, which decides by them whether it compiles at all.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton

from bench import RESULTS
from bench.kernels.assembly import of_kernel
from bench.kernels.compiling import ARCHITECTURES, compiled
from bench.kernels.launches import is_tabled, launches
from bench.parser import make_parser
from erniem_fast.kernels import add_norm, device

TABLE = RESULTS / "codegen.md"

INTRODUCTION = """# What the kernels compile to

Made by `python -m bench codegen` with Triton {version} from kernels with the digest {digest}, without a GPU; nothing
here is a time. `spills` are bytes of local memory a thread, `shared` bytes of a program, `products` the instruction of
matrix products, `loads` and `stores` the bytes of the widest of a thread. Architectures share a line where all figures
are the same. Kernels without dropout, whose code is a part of those with it, have lines where their tiles are others.

"""


@dataclass(frozen=True)
class Row:
    """One compiled kernel; the table's introduction says what its columns mean."""

    op: str
    kernel: str
    dtype: str
    size: int
    dropout: str
    arch: str
    warps: int
    registers: int
    spills: int
    shared: int
    products: str
    loads: int
    stores: int

    def broken_rules(self) -> list[str]:
        """What the rules for kernels forbid."""
        broken = []
        is_attention, architecture = self.op.startswith("attention"), ARCHITECTURES[self.arch]
        if self.shared > architecture.shared:
            broken.append(f"{self.shared} bytes of shared memory, of {architecture.shared} that are there")
        if self.spills > self.allowed_spills():
            broken.append(f"spills {self.spills} bytes a thread")
        if not is_attention and (self.loads, self.stores) != (16, 16):
            broken.append(f"loads {self.loads} and stores {self.stores} bytes at once, not 16")
        wanted = architecture.products
        if is_attention and self.dtype != "float32" and self.size <= 128 and self.products != wanted:
            broken.append(f"multiplies with {self.products}, not {wanted}")
        return broken

    def allowed_spills(self) -> float:
        """0 if the kernel uses all of its registers; otherwise 8 on NVIDIA's, which ptxas may trade for occupancy."""
        if self.op.startswith("attention") and self.size > self.largest_head():
            return inf
        return 0 if device.is_amd(self.arch) or self.registers == 255 else 8

    def largest_head(self) -> float:
        """Attention's largest `size` that must not spill. Beyond, all tiles do; no ERNIE-M's is larger than 64."""
        if self.dtype == "float32":
            return 128 if device.is_cdna(self.arch) else 64  # without matrix instructions a lane holds a whole row
        return 128 if device.is_rdna(self.arch) else inf


COLUMNS = [field.name for field in fields(Row)]
ARCH = COLUMNS.index("arch")


def all_rows(arch: str) -> list[Row]:
    """What is shipped, compiled for an architecture."""
    return rows(arch, launches(arch))


def tabled_rows(arch: str) -> list[Row]:
    """Half of them: every kernel with dropout, which has all of its code, and without where its tiles are others."""
    return rows(arch, (launch for launch in launches(arch) if is_tabled(arch, *launch)))


def rows(arch: str, launches: Iterable[tuple]) -> list[Row]:
    """A row for each kernel, under the first of the names that it is launched by."""
    of_kernels = {}
    for op, call, dtype, size, seed, *rest in launches:
        for kernel in compiled(arch, call, dtype, size, seed, *rest):
            if kernel.hash not in of_kernels:
                of_kernels[kernel.hash] = row(arch, op, dtype, size, seed is not None, kernel)
    return [*of_kernels.values()]


def row(arch: str, op: str, dtype: torch.dtype, size: int, dropout: bool, kernel) -> Row:
    return Row(
        op=op,
        kernel=kernel.metadata.name.strip("_").removesuffix("_kernel"),
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        dropout="yes" if dropout else "no",
        arch=arch,
        warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        **of_kernel(arch, kernel),
    )


def digest() -> str:
    """Of the kernels' sources: where it differs from the table's, the table is out of date."""
    sources = sorted(Path(add_norm.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def on_architectures(rows: Callable[[str], list[Row]], architectures: Iterable[str] = ARCHITECTURES) -> list[Row]:
    with ProcessPoolExecutor(2) as pool:
        return [row for rows_of_arch in pool.map(rows, architectures) for row in rows_of_arch]


def table(rows: list[Row]) -> str:
    """Markdown: the lines of a kernel stand together, one for all architectures with the same figures."""
    kernels: dict[tuple, dict[tuple, list[str]]] = {}
    for row in rows:
        cells = astuple(row)
        kernels.setdefault(cells[:ARCH], {}).setdefault(cells[ARCH + 1 :], []).append(row.arch)
    lines = [
        (*kernel, ", ".join(architectures), *figures)
        for kernel, by_figures in kernels.items()
        for figures, architectures in by_figures.items()
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS), *lines))


def read_table() -> list[Row]:
    """The rows that are in the table now."""
    lines = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("|")][2:]
    kinds = [field.type for field in fields(Row)]
    return [
        Row(*(kind(cell) for kind, cell in zip(kinds, [*line[:ARCH], arch, *line[ARCH + 1 :]], strict=True)))
        for line in lines
        for arch in line[ARCH].split(", ")
    ]


def main(argv: list[str] | None = None) -> int:
    """Compile and table; returns the exit code: 1 if a kernel breaks a rule."""
    parser = make_parser("codegen", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only look for kernels that break a rule")
    check = parser.parse_args(argv).check
    compiled_rows = on_architectures(all_rows)
    broken = [(row, rule) for row in compiled_rows for rule in row.broken_rules()]
    for row, rule in broken:
        print(f"{row.arch} {row.op} {row.kernel} {row.dtype} {row.size} dropout={row.dropout}: {rule}")
    print(f"{len(compiled_rows)} kernels, {len(broken)} broken rules")
    if not check:
        introduction = INTRODUCTION.format(version=triton.__version__, digest=digest())
        TABLE.write_text(introduction + table(on_architectures(tabled_rows)) + "\n")  # which are compiled by now
    return 1 if broken else 0
