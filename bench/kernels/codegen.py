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
from bench.kernels.assembly import of_kernel, of_ttgir
from bench.kernels.compiling import ARCHITECTURES, MULTIPROCESSORS, Launch, compiled
from bench.kernels.launches import is_tabled, launches
from bench.parser import make_parser
from erniem_fast.kernels import add_norm, device

TABLE = RESULTS / "codegen.md"

INTRODUCTION = """# What the kernels compile to

Made by `python -m bench codegen` with Triton {version} from kernels with the digest {digest}, without a GPU; nothing
here is a time. It has the sizes of the base and the large model; what else is launched is held to the same rules.
Architectures share a line where all figures are the same.

`spills` are bytes of local memory (AMD: scratch) a thread, `shared` bytes of a program, `products` the instruction of
matrix products, `loads` and `stores` the bytes of the widest of a thread. `stages` are tiles in use or in flight as the
kernel asks for them, `in_flight` copies that the loop leaves on their way, on NVIDIA's from 8.0 on. `loop` are the
instructions of the main loop, `elements` a thread's elements of one of its tiles, `masks` the loop's selections and
comparisons of integers (`loop` and `masks` on NVIDIA's alone), `exchanges` the tensors that it exchanges among threads.
`ctas` are the programs that fit a multiprocessor, `launched` those that are launched for each, where they make partial
sums.

"""

# The instructions of the main loop on sm_90 in 16 bits, by op, kernel, dropout and elements: as counted, 5 % more are
# too many; for attention the most that are allowed.
LOOPS = {
    ("bias_gelu", "forward", "no", 8): 133 * 1.05,
    ("bias_gelu", "forward", "no", 16): 261 * 1.05,
    ("bias_gelu", "forward", "yes", 8): 248 * 1.05,
    ("bias_gelu", "forward", "yes", 16): 492 * 1.05,
    ("bias_gelu", "backward", "no", 8): 188 * 1.05,
    ("bias_gelu", "backward", "no", 16): 372 * 1.05,
    ("bias_gelu", "backward", "yes", 8): 293 * 1.05,
    ("bias_gelu", "backward", "yes", 16): 595 * 1.05,
    ("add_norm", "backward", "no", 24): 604 * 1.05,
    ("add_norm", "backward", "yes", 24): 908 * 1.05,
    ("attention", "forward", "no", 64): 480,
    ("attention", "forward", "no", 32): 288 * 1.05,
    ("attention", "forward", "yes", 32): 670,
    # Triton 3.6 compiles this loop to 326 instructions. Triton 3.9 adds 12 for a fence before each of the four
    # products, and 23 because it computes the addresses of their 16 operands one by one.
    ("attention", "backward_keys", "no", 32): 361 * 1.05,
    ("attention", "backward_queries", "no", 32): 280,
    # The backward's loops with dropout have tiles that are half as wide.
    ("attention", "backward_keys", "yes", 16): 452 * 1.05,
    ("attention", "backward_queries", "yes", 16): 353 * 1.05,
}
# RDNA's matrix instructions for tiles of 8 rows, which heads of 128 need there, came with Triton 3.8.
MULTIPLIES_EIGHT_ROWS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)

WITHOUT_EXCHANGE = ("forward", "backward_queries")  # attention's kernels that sum over the columns of a tile alone

# Attention kernels whose program takes a whole multiprocessor, and why that is accepted.
ALONE = {
    ("attention ≤ 128", "backward"): "holds all keys of a sequence and three sums, so that each is read once",
    ("attention, many", "backward"): "the same kernel for longer sequences",
}


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
    stages: int
    in_flight: int
    loop: int
    elements: int
    masks: int
    exchanges: int
    ctas: int
    launched: int

    def broken_rules(self) -> list[str]:
        """What the rules for kernels forbid."""
        architecture = ARCHITECTURES[self.arch]
        checks = {
            f"{self.shared} bytes of shared memory, of {architecture.shared} that are there": (
                self.shared > architecture.shared
            ),
            f"spills {self.spills} bytes a thread": self.spills > self.allowed_spills(),
            f"launches {self.launched} programs a multiprocessor, where {self.ctas} fit": self.launched > self.ctas,
            f"asks for {self.stages} stages and has no copy in flight": (
                self.stages > 1 and self.in_flight == 0 and self.copies_ahead() and not self.has_one_tile()
            ),
            f"{self.loop} instructions in a loop over {self.elements} elements": self.is_long(),
        }
        broken = [rule for rule, breaks in checks.items() if breaks]
        return broken + (self.broken_by_attention() if self.is_attention() else self.broken_by_rows())

    def broken_by_rows(self) -> list[str]:
        if (self.loads, self.stores) != (16, 16) and self.kernel != "sum":
            return [f"loads {self.loads} and stores {self.stores} bytes at once, not 16"]
        return []

    def broken_by_attention(self) -> list[str]:
        wanted, halves = ARCHITECTURES[self.arch].products, self.dtype != "float32"
        broken = []
        if halves and self.size <= min(128, self.largest_head()) and self.products != wanted:
            broken.append(f"multiplies with {self.products}, not {wanted}")
        # Blackwell's products of 128 rows are twice as fast as two of 64, and leave their sums in a memory of their
        # own, from where they go to registers: so one program fits, and its tensors are exchanged.
        if not halves or self.size != 64 or not self.copies_ahead() or self.arch == "sm_100":
            return broken
        if self.kernel in WITHOUT_EXCHANGE and self.in_flight > 0 and self.exchanges > 0:
            broken.append(f"exchanges {self.exchanges} tensors in a loop")
        # A thread has two rows; with four of these for each it finds maxima, but masks no tile.
        plain_forward = (self.op, self.kernel, self.dropout) == ("attention", "forward", "no")
        if plain_forward and self.arch in ("sm_80", "sm_90") and self.masks > 4 * 2:
            broken.append(f"{self.masks} selections and comparisons in a loop without masks")
        if self.ctas < 2 and (self.op, self.kernel) not in ALONE:
            broken.append("one program fits a multiprocessor, not two")
        return broken

    def is_attention(self) -> bool:
        return self.op.startswith("attention")

    def copies_ahead(self) -> bool:
        """Whether the architecture copies to shared memory while it computes: NVIDIA's from 8.0 on."""
        return not device.is_amd(self.arch) and self.arch != "sm_75"

    def has_one_tile(self) -> bool:
        """Whether the loop runs once, and has nothing to copy ahead."""
        return self.op.startswith("attention ≤")

    def is_long(self) -> bool:
        """Whether the main loop has more instructions than `LOOPS` allows."""
        most = LOOPS.get((self.op, self.kernel, self.dropout, self.elements), inf)
        counted = self.arch == "sm_90" and self.dtype != "float32" and self.size in (64, 768, 1024, 3072)
        return counted and self.loop > most

    def allowed_spills(self) -> float:
        """0 if the kernel uses all of its registers; otherwise 8 on NVIDIA's, which ptxas may trade for occupancy."""
        if self.is_attention() and self.size > self.largest_head():
            return inf
        return 0 if device.is_amd(self.arch) or self.registers == 255 else 8

    def largest_head(self) -> float:
        """Attention's largest `size` that must not spill. Beyond, all tiles do; no ERNIE-M's is larger than 64."""
        if self.dtype == "float32":
            return 128 if device.is_cdna(self.arch) else 64  # without matrix instructions a lane holds a whole row
        if device.is_rdna(self.arch):
            return 128 if MULTIPLIES_EIGHT_ROWS else 64
        return inf


COLUMNS = [field.name for field in fields(Row)]
ARCH = COLUMNS.index("arch")


def all_rows(arch: str) -> list[Row]:
    """What is shipped, compiled for an architecture."""
    return rows(arch, launches(arch))


def tabled_rows(arch: str) -> list[Row]:
    """What is shipped for the base and the large model."""
    return rows(arch, (launch for launch in launches(arch) if is_tabled(arch, *launch)))


def rows(arch: str, launches: Iterable[tuple]) -> list[Row]:
    """A row for each kernel, under the first of the names that it is launched by."""
    of_kernels = {}
    for op, call, dtype, size, seed, *rest in launches:
        for launch in compiled(arch, call, dtype, size, seed, *rest):
            if launch.kernel.hash not in of_kernels:
                of_kernels[launch.kernel.hash] = row(arch, op, dtype, size, seed is not None, launch)
    return [*of_kernels.values()]


def row(arch: str, op: str, dtype: torch.dtype, size: int, dropout: bool, launch: Launch) -> Row:
    kernel, warps, shared = launch.kernel, launch.kernel.metadata.num_warps, launch.kernel.metadata.shared
    figures = of_kernel(arch, kernel)
    architecture = ARCHITECTURES[arch]
    return Row(
        op=op,
        kernel=kernel.metadata.name.strip("_").removesuffix("_kernel"),
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        dropout="yes" if dropout else "no",
        arch=arch,
        warps=warps,
        shared=shared,
        stages=launch.constant("STAGES") or 1,
        elements=elements(launch) // (warps * architecture.lanes),
        ctas=architecture.fits(figures["registers"], shared, warps),
        launched=-(-launch.programs // MULTIPROCESSORS) if makes_partial_sums(launch) else 0,
        **of_ttgir(kernel.asm["ttgir"]),
        **figures,
    )


def makes_partial_sums(launch: Launch) -> bool:
    return launch.takes("partials_ptr") and launch.takes("rows_per_program")


def elements(launch: Launch) -> int:
    """The elements of a tile of a kernel: rows by features, or by rows of another tile in attention."""
    rows, step, chunks = (launch.constant(name) for name in ("ROWS", "STEP", "CHUNKS"))
    return launch.constant("BLOCK") * (rows or step or 1) * (chunks or 1)


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
