"""Compiles the kernels as they are launched, for every architecture and without a GPU, and tables what came out.

    python bench/codegen.py             prints the kernels that break a rule and writes bench/results/codegen.md
    python bench/codegen.py --check     only prints them

The exit status is 1 if there are any.

The launches are the kernels' own: only the driver is replaced, by one that names the architecture, and the launch
itself, by compilation. So configurations, argument types and alignment are what a GPU of that kind would get.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from math import inf
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from erniem_fast.kernels import attention, bias_gelu_dropout, device, layernorm

TABLE = Path(__file__).parents[1] / "results" / "codegen.md"
KIB = 1024
MULTIPROCESSORS = 132
MANY = 300  # sequences, enough for the backward in one pass at any length


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        shared: bytes of shared memory that a program may have.
        products: the instruction that multiplies matrices of 16-bit numbers.
        lanes: threads of a warp.
    """

    shared: int
    products: str = "mma.sync"
    lanes: int = 32


ARCHITECTURES = {
    "sm_75": Architecture(64 * KIB),
    "sm_80": Architecture(163 * KIB),
    "sm_86": Architecture(99 * KIB),
    "sm_89": Architecture(99 * KIB),
    "sm_90": Architecture(227 * KIB, "wgmma"),
    "sm_100": Architecture(227 * KIB, "tcgen05"),
    "sm_120": Architecture(99 * KIB),
    "gfx90a": Architecture(64 * KIB, "v_mfma", lanes=64),
    "gfx942": Architecture(64 * KIB, "v_mfma", lanes=64),
    "gfx1100": Architecture(64 * KIB, "v_wmma"),
}

INTRODUCTION = """# What the kernels compile to

Made by `python bench/codegen.py` with Triton {version} from kernels with the digest {digest}, without a GPU; nothing
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


class CompilingDriver:
    """Stands in for the driver of a GPU."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self):
        lanes = ARCHITECTURES[self.arch].lanes
        if device.is_amd(self.arch):
            return GPUTarget("hip", self.arch, lanes)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), lanes)

    def get_current_device(self):
        return self.arch  # kernels are cached by device

    def get_current_stream(self, _device):
        return 0


def compiled(arch: str, launch: Callable[..., None], *arguments: object) -> list:
    """The kernels that `launch(*arguments)` launches on a GPU of this architecture, compiled and not launched."""
    kernels, run = [], JITFunction.run
    described = device.Device(arch, MULTIPROCESSORS, ARCHITECTURES[arch].lanes)

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(CompilingDriver(arch))
    for module in (attention, bias_gelu_dropout, layernorm):
        module.describe = lambda _: described
    JITFunction.run = compile_only
    try:
        launch(*arguments)
    finally:
        JITFunction.run = run
    return kernels


def launch_layernorm(dtype: torch.dtype, hidden: int, seed: Tensor | None, tokens: int = 64) -> None:
    x, vector, columns = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype), torch.zeros(tokens)
    layernorm.forward(x, x, vector, vector, vector, 1e-5, columns.long(), columns.long(), 0.1, seed, True)
    layernorm.backward(x, x, vector, 1e-5, columns.long(), columns.long(), 0.1, seed)


def launch_plain_layernorm(dtype: torch.dtype, hidden: int, seed: None, tokens: int = 64) -> None:
    """That of the embeddings, whose dropout is an op of its own."""
    x, vector = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    layernorm.forward(x, None, None, vector, vector, 1e-5, None, None, 0.0, seed, False)
    layernorm.backward(x, x, vector, 1e-5, None, None, 0.0, seed)


def launch_bias_gelu(dtype: torch.dtype, features: int, seed: Tensor | None, tokens: int = 64) -> None:
    x, columns = torch.zeros(tokens, features, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    bias_gelu_dropout.forward(x, x[0], "gelu", columns, columns, 0.1, seed)
    bias_gelu_dropout.backward(x, x, x[0], "gelu", columns, columns, 0.1, seed)


def launch_attention(
    dtype: torch.dtype, head_dim: int, seed: Tensor | None, max_seqlen: int = 512, sequences: int = 1
) -> None:
    heads = 768 // head_dim  # the base model's hidden size
    qkv, columns = torch.zeros(64, 3 * heads * head_dim, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    order, cu_seqlens = torch.zeros(sequences, dtype=torch.int64), torch.zeros(sequences + 1).int()
    case = (order, True, cu_seqlens, max_seqlen, columns, columns, None, heads, 0.1, 0.1, seed)
    out, statistics = attention.forward(qkv, *case)
    attention.backward(out, out, statistics, qkv, *case)


def launches(arch: str) -> Iterator[tuple]:
    """`(op, launch, dtype, size, seed, …)` of all that an architecture is served, with and without dropout."""
    for seed in (None, torch.ones(1, dtype=torch.int64)):
        for dtype in (torch.float16, torch.float32):
            for hidden in (768, 1024, 4096):
                yield "layernorm", launch_layernorm, dtype, hidden, seed
                if seed is None:
                    yield "layernorm, plain", launch_plain_layernorm, dtype, hidden, seed
            yield "bias_gelu_dropout", launch_bias_gelu, dtype, 3072, seed
            if arch != "sm_75":
                yield from attention_launches(dtype, seed)
        if arch != "sm_75":
            yield "layernorm", launch_layernorm, torch.bfloat16, 768, seed
            yield "bias_gelu_dropout", launch_bias_gelu, torch.bfloat16, 3072, seed
            yield "attention", launch_attention, torch.bfloat16, 64, seed


def attention_launches(dtype: torch.dtype, seed: Tensor | None) -> Iterator[tuple]:
    for head_dim in (32, 64, 128, 256):
        yield "attention", launch_attention, dtype, head_dim, seed
        yield "attention, many", launch_attention, dtype, head_dim, seed, 512, MANY
    of_one_block = ((64, 64), (128, 64), (64, 128)) if dtype == torch.float16 else ((16, 64),)
    for max_seqlen, head_dim in of_one_block:
        yield f"attention ≤ {max_seqlen}", launch_attention, dtype, head_dim, seed, max_seqlen


def all_rows(arch: str) -> list[Row]:
    """What is shipped, compiled for an architecture."""
    return rows(arch, launches(arch))


def tabled_rows(arch: str) -> list[Row]:
    """Half of them: every kernel with dropout, which has all of its code, and without where its tiles are others."""
    return rows(arch, (launch for launch in launches(arch) if is_tabled(arch, *launch)))


def is_tabled(arch: str, op: str, _, dtype: torch.dtype, size: int, seed: Tensor | None, max_seqlen=512, *rest) -> bool:
    plain, dropout = (attention.forward_config(arch, dtype, size, max_seqlen, drops) for drops in (False, True))
    return seed is not None or op == "layernorm, plain" or (op.startswith("attention") and plain != dropout)


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
        **(of_amdgcn(kernel.asm["amdgcn"]) if device.is_amd(arch) else of_ptx(kernel.asm["ptx"], kernel.asm["cubin"])),
    )


def of_ptx(ptx: str, cubin: bytes) -> dict[str, int | str]:
    """A row's figures of what was compiled for one of NVIDIA's."""
    registers, stack, local = resource_usage(cubin)
    return {
        "registers": registers,
        "spills": stack + local,
        "products": next((name for name in ("wgmma", "tcgen05", "mma.sync") if name + "." in ptx), "-"),
        "loads": 16 if "cp.async.cg" in ptx else widest(r"ld\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx),
        "stores": widest(r"st\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx),
    }


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, and bytes of stack and of local memory, of a thread."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    return int(found[1]), int(found[2]), int(found[3])


def of_amdgcn(assembly: str) -> dict[str, int | str]:
    """A row's figures of what was compiled for one of AMD's."""

    def figure(name: str) -> int:
        return int(re.search(rf"{name}: +(\d+)", assembly)[1])

    width = r"(?:dword(?:x(\d))?|b(\d+))\b"  # as gfx9 and gfx11 call it
    return {
        "registers": figure(".vgpr_count"),
        "spills": max(figure("ScratchSize"), 4 * figure(".vgpr_spill_count")),
        "products": next((name for name in ("v_mfma", "v_wmma") if name in assembly), "-"),
        "loads": widest(rf"(?:buffer|global)_load_{width}", assembly),
        "stores": widest(rf"(?:buffer|global)_store_{width}", assembly),
    }


def widest(instruction: str, assembly: str) -> int:
    """The bytes that the widest of these instructions moves; a match has a count of elements and the bits of one."""
    found = re.findall(instruction, assembly)
    return max((int(count or 1) * int(bits or 32) // 8 for count, bits in found), default=0)


def digest() -> str:
    """Of the kernels' sources: where it differs from the table's, the table is out of date."""
    sources = sorted(Path(layernorm.__file__).parent.glob("*.py"))
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


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="write nothing, only look for rows that break a rule")
    check = arguments.parse_args().check
    compiled_rows = on_architectures(all_rows)
    broken = [(row, rule) for row in compiled_rows for rule in row.broken_rules()]
    for row, rule in broken:
        print(f"{row.arch} {row.op} {row.kernel} {row.dtype} {row.size} dropout={row.dropout}: {rule}")
    print(f"{len(compiled_rows)} kernels, {len(broken)} broken rules")
    if not check:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        introduction = INTRODUCTION.format(version=triton.__version__, digest=digest())
        TABLE.write_text(introduction + table(on_architectures(tabled_rows)) + "\n")  # which are compiled by now
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
