"""What the kernels compile to for GPUs that are not here; in processes of their own, as this one may interpret."""

import json
import os
import subprocess
import sys

from tests import ROOT


def in_process_of_its_own(code):
    """The JSON that `code` prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table_is_of_these_kernels_and_breaks_no_rule():
    code = """
import json
from bench.kernels import codegen
rows = codegen.read_table()
introduction = codegen.TABLE.read_text().split("|")[0]
print(json.dumps({
    "up to date": codegen.digest() in introduction,
    "broken": [f"{row}: {rule}" for row in rows for rule in row.broken_rules()],
    "archs": sorted({row.arch for row in rows}),
    "all archs": sorted(codegen.ARCHITECTURES),
    "kernels": sorted({(row.op, row.kernel) for row in rows}),
    "launches": len(rows),
}))
"""
    found = in_process_of_its_own(code)
    assert found["up to date"], "the kernels have changed; run `python -m bench codegen`"
    assert found["broken"] == []
    assert found["archs"] == found["all archs"]
    assert found["kernels"] == [
        *([op, kernel] for op in ("add_norm", "add_norm, plain") for kernel in ("backward", "forward")),
        *(["attention", kernel] for kernel in ("backward_keys", "backward_queries", "forward")),
        *(["attention ≤ 128", kernel] for kernel in ("backward", "forward")),
        *(["attention ≤ 16", kernel] for kernel in ("backward", "forward")),
        *(["attention ≤ 64", kernel] for kernel in ("backward", "forward")),
        ["attention, many", "backward"],
        *(["bias_gelu", kernel] for kernel in ("backward", "forward")),
    ]
    assert (
        found["launches"] == 28 + 4 * 75 + 2 * 85 + 2 * 75 + 60
    )  # Turing, NVIDIA's, those with larger tiles, CDNA, RDNA


def test_the_rules_for_amd():
    code = """
import json
from dataclasses import replace
from bench.kernels import codegen
row = codegen.Row("attention", "forward", "bfloat16", 64, "yes", "gfx942", 8, 256, 0, 65536, "v_mfma", 16, 8)
print(json.dumps([each.broken_rules() for each in (
    row,
    replace(row, spills=4),
    replace(row, shared=65537),
    replace(row, products="-"),
    replace(row, products="v_wmma", arch="gfx1100", size=256, spills=4),
    replace(row, op="add_norm", size=768, products="-"),
)]))
"""
    assert in_process_of_its_own(code) == [
        [],
        ["spills 4 bytes a thread"],
        ["65537 bytes of shared memory, of 65536 that are there"],
        ["multiplies with -, not v_mfma"],
        [],  # heads of 256, which no ERNIE-M has, do not fit into RDNA's registers
        ["loads 16 and stores 8 bytes at once, not 16"],
    ]


def test_what_compiles_here_keeps_the_rules_and_is_in_the_table():
    """Figures are compared where Triton is the table's; for NVIDIA's, the rules hold for every other one too.

    What compiles for sm_89 is what compiles for sm_86, and for gfx90a nearly what does for gfx942.
    """
    code = """
import json
from bench.kernels import codegen
import triton
rows = codegen.on_architectures(codegen.tabled_rows, codegen.ARCHITECTURES.keys() - {"sm_89", "gfx90a"})
same_triton = f"Triton {triton.__version__} " in codegen.TABLE.read_text()
print(json.dumps({
    "rows": len(rows),
    "broken": [
        f"{row}: {rule}"
        for row in rows
        if same_triton or not codegen.device.is_amd(row.arch)
        for rule in row.broken_rules()
    ],
    "unknown": [str(row) for row in rows if row not in codegen.read_table()] if same_triton else [],
}))
"""
    assert in_process_of_its_own(code) == {"rows": 28 + 3 * 75 + 2 * 85 + 75 + 60, "broken": [], "unknown": []}


def test_token_counts_and_lengths_compile_nothing_new():
    code = """
import json
from bench.kernels import codegen, launches
import torch
seed = torch.ones(1, dtype=torch.int64)
counts = {}
for launch, size, varied in (
    (launches.launch_add_norm, 768, (1, 2, 15, 16, 17, 1000, 5000)),
    (launches.launch_bias_gelu, 3072, (1, 2, 15, 16, 17, 1000, 5000)),
    (launches.launch_attention, 64, (65, 100, 128, 129, 512)),
):
    case = ("sm_90", launch, torch.float16, size, seed)
    compiled = [kernel for each in varied for kernel in codegen.compiled(*case, each)]
    counts[launch.__name__] = [len(compiled), len({kernel.hash for kernel in compiled})]
print(json.dumps(counts))
"""
    assert in_process_of_its_own(code) == {
        "launch_add_norm": [14, 2],
        "launch_bias_gelu": [14, 2],
        "launch_attention": [12, 4],  # at most 128 keys: one kernel of the backward; more: two
    }


def test_no_size_is_compiled_anew():
    """Whatever the tokens, lengths and sequences: one compilation of a kernel, two where short sequences have tiles."""
    code = """
import json
from bench.kernels import codegen, launches
import torch
from itertools import accumulate
from erniem_fast.batch import TokenBatch
from erniem_fast.kernels import attention

seed = torch.tensor([3])

def launch_rows(launch, size):
    for tokens in (1, 2, 15, 16, 17, 128, 333, 16384, 16385):
        launch(torch.float16, size, seed, tokens)

def launch_attention():
    short, long = ([1], [2, 1], [16] * 16, [64, 3, 0], [65], [128] * 31), ([70, 512, 33], [257, 1, 2], [512] * 4)
    for lengths in (*short, *long, [129] * 140):
        batch = TokenBatch.from_cu_seqlens(torch.tensor([0, *accumulate(lengths)]), max(lengths), sum(lengths))
        qkv = torch.zeros(batch.tokens, 3 * 128, dtype=torch.float16)
        for scale, p in ((0.125, 0.1), (0.2, 0.3)):
            case = (batch.sequences, 2, scale, batch.dropout(p, seed))
            out, statistics = attention.forward(qkv, *case)
            attention.backward(out, out, statistics, qkv, *case)

def count(*launch):
    kernels = {}
    for kernel in codegen.compiled("sm_90", *launch):
        kernels.setdefault(kernel.metadata.name, []).append(kernel.hash)
    return {name: [len(hashes), len({*hashes})] for name, hashes in sorted(kernels.items())}

print(json.dumps([
    count(launch_rows, launches.launch_add_norm, 768),
    count(launch_rows, launches.launch_bias_gelu, 3072),
    count(launch_attention),
]))
"""
    add_norm, bias_gelu, attention = in_process_of_its_own(code)
    assert add_norm == bias_gelu == {"_backward_kernel": [9, 1], "_forward_kernel": [9, 1]}
    assert attention == {
        "_backward_kernel": [14, 3],  # with tiles for up to 64 keys and up to 128, and with sums in memory
        "_backward_keys_kernel": [6, 1],
        "_backward_queries_kernel": [6, 1],
        "_forward_kernel": [20, 2],
    }
