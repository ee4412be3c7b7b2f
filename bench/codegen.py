"""Compiles the kernels as they are launched, for every architecture and without a GPU, and tables what came out.

    python bench/codegen.py             writes bench/results/codegen.md
    python bench/codegen.py --check     prints the rows that break a rule, exit status 1 if there are any

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

TABLE = Path(__file__).parent / "results" / "codegen.md"
KIB = 1024
MANY = 300  # sequences, enough for the backward in one pass at any length
SHARED_LIMITS = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
TENSOR_CORE = {90: "wgmma", 100: "tcgen05"}  # mma.sync elsewhere


INTRODUCTION = """# What the kernels compile to

Made by `python bench/codegen.py` with Triton {version} from kernels with the digest {digest}, without a GPU; nothing
here is a time. `spills` are bytes of local memory a thread, `shared` bytes of a program, `loads` and `stores` the bytes
of the widest of a thread.

"""


@dataclass(frozen=True)
class Row:
    """One compiled kernel; the table's introduction says what its columns mean."""

    op: str
    kernel: str
    dtype: str
    size: int
    dropout: str
    arch: int
    warps: int
    registers: int
    spills: int
    shared: int
    tensor_core: str
    loads: int
    stores: int

    def broken_rules(self) -> list[str]:
        """What the rules for kernels forbid."""
        broken = []
        is_attention = self.op.startswith("attention")
        if self.shared > SHARED_LIMITS[self.arch]:
            broken.append(f"{self.shared} bytes of shared memory, of {SHARED_LIMITS[self.arch]} that are there")
        # No ERNIE-M has heads of more than 64; without tensor cores a lane holds a whole row of them.
        if self.spills > self.allowed_spills() and not (is_attention and self.dtype == "float32" and self.size > 64):
            broken.append(f"spills {self.spills} bytes a thread")
        if not is_attention and (self.loads, self.stores) != (16, 16):
            broken.append(f"loads {self.loads} and stores {self.stores} bytes at once, not 16")
        wanted = TENSOR_CORE.get(self.arch, "mma.sync")
        if is_attention and self.dtype != "float32" and self.size <= 128 and self.tensor_core != wanted:
            broken.append(f"multiplies with {self.tensor_core}, not {wanted}")
        return broken

    def allowed_spills(self) -> int:
        """None where registers run out; else the two that the assembler may trade for occupancy."""
        return 0 if self.registers == 255 else 8


class CompilingDriver:
    """Stands in for the driver of a GPU."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # kernels are cached by device

    def get_current_stream(self, _device):
        return 0


def compiled(arch: int, launch: Callable[..., None], *arguments: object) -> list:
    """The kernels that `launch(*arguments)` launches on a GPU of this architecture, compiled and not launched."""
    kernels, run = [], JITFunction.run
    described = device.Device(arch, multiprocessors=132)

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
    out, lse = attention.forward(qkv, *case)
    attention.backward(out, out, lse, qkv, *case)


def launches(arch: int) -> Iterator[tuple]:
    """`(op, launch, dtype, size, seed, …)` of all that an architecture is served, with and without dropout."""
    for seed in (None, torch.ones(1, dtype=torch.int64)):
        for dtype in (torch.float16, torch.float32):
            for hidden in (768, 1024, 4096):
                yield "layernorm", launch_layernorm, dtype, hidden, seed
                if seed is None:
                    yield "layernorm, plain", launch_plain_layernorm, dtype, hidden, seed
            yield "bias_gelu_dropout", launch_bias_gelu, dtype, 3072, seed
            if arch >= 80:
                yield from attention_launches(dtype, seed)
        if arch >= 80:
            yield "attention", launch_attention, torch.bfloat16, 64, seed


def attention_launches(dtype: torch.dtype, seed: Tensor | None) -> Iterator[tuple]:
    for head_dim in (32, 64, 128, 256):
        yield "attention", launch_attention, dtype, head_dim, seed
        yield "attention, many", launch_attention, dtype, head_dim, seed, 512, MANY
    of_one_block = ((64, 64), (128, 64), (64, 128)) if dtype == torch.float16 else ((16, 64),)
    for max_seqlen, head_dim in of_one_block:
        yield f"attention ≤ {max_seqlen}", launch_attention, dtype, head_dim, seed, max_seqlen


def all_rows(arch: int) -> list[Row]:
    """What is shipped, compiled for an architecture."""
    return rows(arch, launches(arch))


def chosen_rows(arch: int) -> list[Row]:
    """Half of them: every kernel with dropout, which has all of its code, and without where its tiles are others."""
    return rows(arch, (launch for launch in launches(arch) if is_chosen(arch, *launch)))


def is_chosen(arch: int, op: str, _, dtype: torch.dtype, size: int, seed: Tensor | None, max_seqlen=512, *rest) -> bool:
    plain, dropout = (attention.forward_config(arch, dtype, size, max_seqlen, drops) for drops in (False, True))
    return seed is not None or op == "layernorm, plain" or (op.startswith("attention") and plain != dropout)


def rows(arch: int, launches: Iterable[tuple]) -> list[Row]:
    """A row for each kernel, under the first of the names that it is launched by."""
    of_kernels = {}
    for op, call, dtype, size, seed, *rest in launches:
        for kernel in compiled(arch, call, dtype, size, seed, *rest):
            if kernel.hash not in of_kernels:
                of_kernels[kernel.hash] = row(arch, op, dtype, size, seed is not None, kernel)
    return [*of_kernels.values()]


def row(arch: int, op: str, dtype: torch.dtype, size: int, dropout: bool, kernel) -> Row:
    registers, stack, local = resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    tensor_core = next((name for name in ("wgmma", "tcgen05", "mma.sync") if name + "." in ptx), "-")
    return Row(
        op=op,
        kernel=kernel.metadata.name.strip("_").removesuffix("_kernel"),
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        dropout="yes" if dropout else "no",
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spills=stack + local,
        shared=kernel.metadata.shared,
        tensor_core=tensor_core,
        loads=16 if "cp.async.cg" in ptx else widest("ld", ptx),
        stores=widest("st", ptx),
    )


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, and bytes of stack and of local memory, of a thread."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    return int(found[1]), int(found[2]), int(found[3])


def widest(instruction: str, ptx: str) -> int:
    """The bytes that the widest load (`ld`) or store (`st`) of a thread moves in global memory."""
    found = re.findall(rf"{instruction}\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def digest() -> str:
    """Of the kernels' sources: where it differs from the table's, the table is out of date."""
    sources = sorted(Path(layernorm.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def on_every_architecture(rows: Callable[[int], list[Row]]) -> list[Row]:
    with ProcessPoolExecutor(2) as pool:
        return [row for rows_of_arch in pool.map(rows, SHARED_LIMITS) for row in rows_of_arch]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each kernel; registers, spills (if any) and shared memory for each architecture."""
    names = [field.name for field in fields(Row)]
    lines = [" | ".join(map(str, astuple(row))) for row in rows]
    return "\n".join(f"| {line} |" for line in (" | ".join(names), " | ".join("---" for _ in names), *lines))


def read_table() -> list[Row]:
    """The rows that are in the table now."""
    cells = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("|")][2:]
    kinds = [field.type for field in fields(Row)]
    return [Row(*(kind(value) for kind, value in zip(kinds, line, strict=True))) for line in cells]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="write nothing, only look for rows that break a rule")
    check = arguments.parse_args().check
    compiled_rows = on_every_architecture(all_rows)
    broken = [(row, rule) for row in compiled_rows for rule in row.broken_rules()]
    for row, rule in broken:
        print(f"sm_{row.arch} {row.op} {row.kernel} {row.dtype} {row.size} dropout={row.dropout}: {rule}")
    print(f"{len(compiled_rows)} kernels, {len(broken)} broken rules")
    if not check:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(INTRODUCTION.format(version=triton.__version__, digest=digest()) + table(compiled_rows) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
