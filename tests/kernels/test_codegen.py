"""What the kernels compile to for GPUs that are not here."""

from itertools import chain

from bench.kernels import assembly


def test_the_table_is_of_these_kernels_and_breaks_no_rule(compiling):
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
    "sizes": sorted({row.size for row in rows}),
}))
"""
    found = compiling(code)
    assert found["up to date"], "the kernels have changed; run `python -m bench codegen`"
    assert found["broken"] == []
    assert found["archs"] == found["all archs"]
    assert found["kernels"] == [
        *(["add_norm", kernel] for kernel in ("backward", "forward", "sum")),
        ["add_norm, plain", "forward"],
        *(["attention", kernel] for kernel in ("backward_keys", "backward_queries", "forward")),
        *(["attention ≤ 128", kernel] for kernel in ("backward", "forward")),
        *(["attention ≤ 32", kernel] for kernel in ("backward", "forward")),
        *(["attention ≤ 64", kernel] for kernel in ("backward", "forward")),
        ["attention, many", "backward"],
        *(["bias_gelu", kernel] for kernel in ("backward", "forward")),
        ["dequantise", "dequantise"],
        *([f"quantise {dtype}", "quantise"] for dtype in ("float8", "int8")),
    ]
    assert found["sizes"] == [64, 768, 1024, 3072]


FORWARD = """
import json
from dataclasses import replace
from bench.kernels import codegen
forward = codegen.Row(
    op="attention", kernel="forward", dtype="bfloat16", size=64, dropout="no", arch="sm_90", warps=8, registers=128,
    spills=0, shared=65536, products="wgmma", loads=16, stores=16, stages=3, in_flight=2, loop=480, elements=64,
    masks=8, exchanges=0, ctas=2, launched=0,
)
"""


def test_the_rules(compiling):
    code = """
gelu = replace(
    forward, op="bias_gelu", size=3072, products="-", loop=261, elements=16, stages=1, in_flight=0, ctas=8, launched=8
)
print(json.dumps([each.broken_rules() for each in (
    forward,
    replace(forward, loop=481),
    replace(forward, masks=9),
    replace(forward, exchanges=1),
    replace(forward, kernel="backward_keys", exchanges=1),
    replace(forward, in_flight=0),
    replace(forward, op="attention ≤ 64", in_flight=0),
    replace(forward, stages=1, in_flight=0),
    replace(forward, ctas=1),
    replace(forward, op="attention ≤ 128", kernel="backward", ctas=1),
    replace(forward, op="attention ≤ 64", kernel="backward", ctas=1),
    gelu,
    replace(gelu, loop=274),
    replace(gelu, loop=275),
    replace(gelu, launched=9),
    replace(gelu, spills=9),
    replace(gelu, stores=8),
)]))
"""
    assert compiling(FORWARD + code) == [
        [],
        ["481 instructions in a loop over 64 elements"],
        ["9 selections and comparisons in a loop without masks"],
        ["exchanges 1 tensors in a loop"],
        [],
        ["asks for 3 stages and has no copy in flight"],
        [],
        [],
        ["one program fits a multiprocessor, not two"],
        [],
        ["one program fits a multiprocessor, not two"],
        [],
        [],
        ["275 instructions in a loop over 16 elements"],
        ["launches 9 programs a multiprocessor, where 8 fit"],
        ["spills 9 bytes a thread"],
        ["loads 16 and stores 8 bytes at once, not 16"],
    ]


def test_counts_of_kernels_that_are_known(compiling):
    """Of 20 and 30 multiply-adds for each of four elements, with a selection, exchanges, and copies ahead."""
    code = """
import json
from bench.kernels import codegen
from tests.kernels import counted

def counts(arch, *arguments):
    (launch,) = codegen.compiled(arch, counted.launch, *arguments)
    row = codegen.row(arch, "counted", codegen.torch.float32, 0, False, launch)
    return [row.loop, row.masks, row.exchanges, row.in_flight, row.elements, row.stages]

print(json.dumps({arch: [
    counts(arch, 20), counts(arch, 30), counts(arch, 30, True), counts(arch, 30, False, 1),
    *(counts(arch, 30, False, 0, stages) for stages in (2, 3, 4)),
] for arch in ("sm_80", "sm_90")}))
"""
    for few, many, masked, exchanged, *staged in compiling(code).values():
        assert 80 < few[0] < 90  # and the loop's own: an address, a load, a comparison, a branch
        assert many[0] - few[0] == 40
        assert masked[1] - many[1] == 4
        assert (many[2], exchanged[2]) == (0, 1)
        assert [each[3] for each in (many, *staged)] == [0, 0, 1, 2]
        assert [each[5] for each in (many, *staged)] == [1, 2, 3, 4]
        assert {each[4] for each in (few, many, masked, exchanged, *staged)} == {4}


def test_the_main_loop_is_the_one_that_copies_ahead(monkeypatch):
    """Of loops with as many products and accesses; the other one, with masks at the end of a sequence, is shorter."""
    loops = [
        ["LDGSTS.E [R1], [R2]", "HGMMA R4, R5", "FMUL R6, R6, R7", "FSEL R6, R6, RZ, P1", "@P0 BRA 0x0"],
        ["LDG.E R1, [R2]", "HGMMA R4, R5", "ISETP.GE R6, R7, R8", "@P0 BRA 0x50"],
    ]
    sass = [(16 * index, text) for index, text in enumerate(chain(*loops))]
    monkeypatch.setattr(assembly, "instructions", lambda _: sass)
    assert assembly.of_sass(b"") == {"loop": 5, "masks": 1}


def test_how_many_programs_fit(compiling):
    code = """
import json
from bench.kernels.compiling import ARCHITECTURES
print(json.dumps([ARCHITECTURES[arch].fits(*program) for arch, *program in (
    ("sm_90", 56, 0, 4),  # 65,536 registers
    ("sm_90", 57, 0, 4),
    ("sm_90", 16, 0, 1),  # 32 programs
    ("sm_90", 16, 0, 8),  # 64 warps
    ("sm_90", 64, 114 * 1024 - 1024, 4),  # of 228 KiB; each program takes 1 KiB more than it asks for
    ("sm_90", 64, 114 * 1024, 4),
    ("sm_75", 64, 32 * 1024, 4),
    ("sm_86", 40, 0, 4),
    ("gfx942", 128, 0, 4),  # 512 registers a lane in each of four parts
    ("gfx942", 136, 0, 4),
    ("gfx1100", 96, 0, 4),  # 1,536
    ("gfx1100", 97, 0, 4),
)]))
"""
    assert compiling(code) == [9, 8, 32, 8, 2, 1, 2, 12, 4, 3, 16, 12]


def test_the_rules_for_amd(compiling):
    code = """
row = replace(forward, dropout="yes", arch="gfx942", registers=256, products="v_mfma", stores=8, loop=0, in_flight=0)
print(json.dumps([each.broken_rules() for each in (
    row,
    replace(row, spills=4),
    replace(row, shared=65537),
    replace(row, products="-"),
    replace(row, products="v_wmma", arch="gfx1100", size=256, spills=4),
    replace(row, op="add_norm", size=768, products="-"),
)]))
"""
    assert compiling(FORWARD + code) == [
        [],
        ["spills 4 bytes a thread"],
        ["65537 bytes of shared memory, of 65536 that are there"],
        ["multiplies with -, not v_mfma"],
        [],  # heads of 256, which no ERNIE-M has, do not fit into RDNA's registers
        ["loads 16 and stores 8 bytes at once, not 16"],
    ]


def test_what_compiles_here_keeps_the_rules_and_is_in_the_table(compiling):
    """Figures are compared where Triton is the table's; for NVIDIA's, the rules hold for every other one too.

    What compiles for sm_89 is what compiles for sm_86, and for gfx90a nearly what does for gfx942.
    """
    code = """
import json
from bench.kernels import codegen
import triton
compiled = codegen.ARCHITECTURES.keys() - {"sm_89", "gfx90a"}
rows = [row for arch in compiled for row in codegen.tabled_rows(arch)]
same_triton = f"Triton {triton.__version__} " in codegen.TABLE.read_text()
print(json.dumps({
    "missing": len(rows) - sum(row.arch in compiled for row in codegen.read_table()) if same_triton else 0,
    "broken": [
        f"{row}: {rule}"
        for row in rows
        if same_triton or not codegen.device.is_amd(row.arch)
        for rule in row.broken_rules()
    ],
    "unknown": [str(row) for row in rows if row not in codegen.read_table()] if same_triton else [],
}))
"""
    assert compiling(code) == {"missing": 0, "broken": [], "unknown": []}


def test_key_biases_and_ranges_keep_the_rules(compiling):
    """The table does not have them: they add to the registers of kernels that it has."""
    code = """
import json
from bench.kernels import codegen, launches
import torch

def of_keys(launch):
    op, _, dtype, *_ = launch
    return op in ("attention, key bias", "attention, key ranges") and dtype == torch.float16

rows = [row for arch in ("sm_80", "sm_90") for row in codegen.rows(arch, filter(of_keys, launches.launches(arch)))]
print(json.dumps([len(rows), [f"{row}: {rule}" for row in rows for rule in row.broken_rules()]]))
"""
    assert compiling(code) == [24, []]  # a forward and two passes of the backward, with and without dropout


def test_sums_of_scores_begin_at_zero(compiling):
    """Where they begin at the key biases, each of their terms is rounded as coarsely as the bias.

    That fails the check "padded with key biases, 1 x 128" on a GPU, and none in the interpreter, which leaves the sum
    of a product and a bias as it is.
    """
    code = """
import json, re
from bench.kernels import codegen, launches
import torch

def products(launch):
    ttir = launch.kernel.asm["ttir"]
    zeros = {*re.findall(r"(%\\w+) = arith.constant dense<0.0", ttir)}
    begins = re.findall(r"tt.dot [^,]+, [^,]+, (%[^ ,]+)", ttir)
    return launch.kernel.metadata.name, [sum(begin in zeros for begin in begins), len(begins)]

case = (launches.launch_attention, torch.float32, 128, None)
print(json.dumps(dict(
    products(launch)
    for max_seqlen in (512, 16)  # in two passes and in one
    for launch in codegen.compiled("sm_90", *case, max_seqlen, 1, torch.zeros(64))
)))
"""
    assert compiling(code) == {
        "_forward_kernel": [1, 2],  # the other product goes on from the last tile's sums
        "_backward_queries_kernel": [2, 3],
        "_backward_keys_kernel": [2, 4],
        "_backward_kernel": [3, 5],
    }


def test_token_counts_and_lengths_compile_nothing_new(compiling):
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
    compiled = [launch.kernel for each in varied for launch in codegen.compiled(*case, each)]
    counts[launch.__name__] = [len(compiled), len({kernel.hash for kernel in compiled})]
print(json.dumps(counts))
"""
    assert compiling(code) == {
        "launch_add_norm": [21, 3],
        "launch_bias_gelu": [14, 2],
        "launch_attention": [15, 3],  # more than 64 keys: two kernels of the backward
    }


def test_no_size_is_compiled_anew(compiling):
    """A kernel is compiled once for all tokens, lengths and sequences, and once more for each tile of short ones."""
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
    for kernel, _ in codegen.compiled("sm_90", *launch):
        kernels.setdefault(kernel.metadata.name, []).append(kernel.hash)
    return {name: [len(hashes), len({*hashes})] for name, hashes in sorted(kernels.items())}

print(json.dumps([
    count(launch_rows, launches.launch_add_norm, 768),
    count(launch_rows, launches.launch_bias_gelu, 3072),
    count(launch_attention),
    count(launch_rows, lambda dtype, size, _, tokens: launches.launch_quantise(dtype, size, _, tokens=tokens), 768),
    count(launch_rows, launches.launch_dequantise, 768),
]))
"""
    add_norm, bias_gelu, attention, quantise, dequantise = compiling(code)
    assert (quantise, dequantise) == ({"_quantise_kernel": [9, 1]}, {"_dequantise_kernel": [9, 1]})
    assert bias_gelu == {"_backward_kernel": [9, 1], "_forward_kernel": [9, 1]}
    assert add_norm == {**bias_gelu, "_sum_kernel": [9, 1]}
    assert attention == {
        "_backward_kernel": [8, 2],  # up to 32 and up to 64 keys
        "_backward_keys_kernel": [12, 1],
        "_backward_queries_kernel": [12, 1],
        "_forward_kernel": [20, 3],
    }
