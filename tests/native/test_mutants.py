"""The CPU's native library broken on purpose: the battery of `python -m erniem_fast verify` catches every mutant.

A mutant is a copy of csrc/ with one text replaced, of which the file of one op is compiled, without optimisation. The
battery has no layers: one with products of 8-bit integers has to have the bits of its ops.
"""

import re
import shutil
import subprocess

import pytest
import torch

from erniem_fast import flags
from erniem_fast.native import compiler, library
from erniem_fast.native import packed as products
from erniem_fast.verification.battery import battery
from tests.mutation import is_caught, parameters, replaced
from tests.native.float_linears import are_all_exact, layer_linears
from tests.native.int8_layers import BATCHES, are_one_after_another, is_its_ops

CPU = torch.device("cpu")
FILE_OF_OP = {
    **{op: f"{op}_cpu.cpp" for op in flags.OPS},
    "product": "linear_cpu.cpp",
    "int8": "packed_cpu.cpp",
    "floats": "packed_cpu.cpp",
    "packed_layer": "packed_layer_cpu.cpp",
}

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")

CHECKS = [check for check in battery(CPU) if check.implementation == "native"]

# By file and function: what is replaced, and by what.
EMBEDDINGS = {
    "embeddings_forward_row": [
        ("sum.x[i] += other.x[i];", ";"),
        ("sum.x[i] *= op.word_scale[op.ids[token]];", ";"),
        ("table_row<W>(op.word_table, op.ids[token]", "table_row<W>(op.word_table, token % op.words"),
        ("* rstd *", "*"),
        (" * weight.x[i]", ""),
        (" + norm_bias.x[i]", ""),
        ("drop(op, token, piece, y);", ""),
    ],
    "embeddings_backward_row": [("drop(op, token, piece, grad_y[piece]);", "")],
    "embeddings_backward_chunk": [
        ("grad_weight[piece] = grad_norm_bias[piece] = {};", ""),
        ("token < end &&", "token < end - 1 &&"),
        ("token < op.tokens", "token < op.tokens - 1"),
    ],
    "has_gradient": [(" && row != op.padding_idx", "")],
    "embeddings_scatter_chunk": [
        ("read(op.order + place + i) * op.hidden", "(place + i) * op.hidden"),
        ("rows[i + 1] == rows[i] && place + i + 1 < end", "false"),
        ("(begin == first && before == rows[i]) || ", ""),
        (" || (place + i + 1 == end && after == rows[i])", ""),
        ("(begin > first)", "0"),
        ("sum = {}, begin = place + i + 1;", "begin = place + i + 1;"),
        ("sum = {}, begin = place + i + 1;", "sum = {};"),
    ],
    "embeddings_scatter_join": [
        ("if (end >= op.tokens) return;", "return;"),
        ("(chunk * 2 + !whole)", "(chunk * 2)"),
        ("table_row_at(op, end) != row || ", ""),
        (" || (whole && first > 0 && table_row_at(op, first - 1) == row)", ""),
        ("if (reached < AHEAD) break;", "break;"),
        ("chunk + 1;; other", "chunk + 2;; other"),
        (" && table_row_at(op, place) == row", ""),
    ],
}
ATTENTION = {
    "forward": [
        ("row[i * width + j] *= factors[seen.first + j];", ";"),
        ("factors[seen.first + j]", "factors[j]"),
        ("right + seen.first", "right"),
        ("values + seen.first * features", "values"),
        ("seen_by(first, count, WIDTH)", "seen_by(first, 1, WIDTH)"),
        ("seen_by(first, count, WIDTH)", "seen_by(0, count, WIDTH)"),
        ("shares[i], this", "1.0f, this"),
    ],
    "backward": [
        ("float(op.scale), KEY", "1.0f, KEY"),
        ("float(op.scale), QUERY", "1.0f, QUERY"),
        ("exponentials({p + first * keys", "exponentials({p"),
        ("keys, 1}, first, end", "keys, 1}, 0, end"),
        ("shares[i - first]", "shares[0]"),
    ],
    "backward_row": [
        ("row[j] *= share;", ";"),
        ("= draw(i);", "= nullptr;"),
        ("dropped = p * factor", "dropped = p"),
        ("load_vector(grad_row + j) * factor", "load_vector(grad_row + j)"),
        ("(grad_row[j] - mean)", "grad_row[j]"),
    ],
}
ATTENTION_TASK = {
    "exponentials": [
        ("range_of(first + i)", "range_of(i)"),
        ("most == -INFINITY ? 0.0f : most", "most"),
        ("float(op.scale)", "1.0f"),
        ("sum == 0.0f ? 0.0f : 1.0f / sum", "1.0f / sum"),
        ("total(sums[i])", "total(sums[0])"),
    ],
    "complete_scores": [
        ("for (int64_t j = end; j < scores.width; ++j) row[j] = -INFINITY;", ""),
        ("for (int64_t j = 0; j < begin; ++j) row[j] = -INFINITY;", ""),
        ("row[j] += op.key_bias[start + key + j] * unscale", ""),
        ("op.key_bias[start + key + j]", "op.key_bias[key + j]"),
        ("op.key_bias[start + key + j]", "op.key_bias[start + j]"),
        (" * unscale", ""),
    ],
    "range_of": [
        ("2 * (start + i)", "2 * i"),
    ],
    "seen_by": [
        ("std::min(seen.first, range.first)", "range.first"),
        ("std::max(seen.end, range.end)", "range.end"),
    ],
    "survey": [
        ("*least / 4 * 4", "*least"),
        ("neighbours && columns[j] == columns[0] + j", "true"),
    ],
    "draw": [
        ("uint32_t(columns[i])", "uint32_t(i)"),
        ("uint32_t(column / 4)", "uint32_t((column - first_column) / 4)"),
        ("query_column, uint32_t(sequence)", "0, uint32_t(sequence)"),
        ("uint32_t(sequence)", "0"),
        ("uint32_t(head)", "0"),
        (">= threshold", "< threshold"),
        ("? rescale", "? 1.0f"),
        ("return all + columns[0] - first_column", "return all"),
        ("all[columns[j] - first_column]", "all[j]"),
    ],
}
# Where the processor multiplies bfloat16.
ATTENTION_BFLOAT16 = {
    "forward": [
        ("seen_by(first, count, COLUMNS)", "seen_by(first, 1, COLUMNS)"),
        ("part(QUERY, first)", "part(QUERY, 0)"),
        ("(chunk + i) * groups", "i * groups"),
        ("chunks / COLUMNS + chunk)", "chunks / COLUMNS)"),
        ("found.row(0, i)", "found.row(0, 0)"),
    ],
    "pack_keys": [
        ("part(KEY, first)", "part(KEY, 0)"),
    ],
    "pack_values": [
        ("uint16_t both[2][COLUMNS] = {};", "uint16_t both[2][COLUMNS]; memset(both, 255, sizeof both);"),
        ("part(VALUE, 2 * pair + i) + column", "part(VALUE, 2 * pair + i)"),
        ("uint32_t(both[1][j]) << 16", "0"),
    ],
    "round_exponentials": [
        ("row[j] *= factors[key + j];", ";"),
        ("factors[key + j]", "factors[j]"),
        ("draw(first + i)", "draw(i)"),
        ("all + i * depth", "all"),
    ],
    "store": [
        (" * shares[i]", ""),
        ("result_of(first + i) + column", "result_of(first + i)"),
        ("result_of(first + i)", "result_of(i)"),
    ],
}
BIAS_GELU = {
    "with_activation": [
        ("return body(Gelu());", "return body(GeluTanh());"),
        ("return body(GeluTanh());", "return body(Gelu());"),
        ("return body(Relu());", "return body(Gelu());"),
    ],
    "": [
        ("normal(x).tail", "0.0f"),
        ("(x > 0.0f ? 1.0f - at.tail : at.tail)", "at.tail"),
        (" + x * at.density", ""),
        ("0.044715f * x * x * x", "0.0f"),
        ("3.0f * 0.044715f", "0.044715f"),
        ("(tail / (whole * whole))", "(tail / whole)"),
        ("x < 0.0f ? 0.0f : x", "x"),
        ("x > 0.0f ? 1.0f : 0.0f;", "1.0f;"),
    ],
    "load_biased": [("x.x[i] += bias.x[i];", ";")],
    "forward_row": [("drop(op, token, piece, y);", "")],
    "backward_row": [
        ("drop(op, token, piece, grad);", ""),
        ("grad.x[i] *= Function::slope(x.x[i]);", ""),
        ("grad_bias[piece].x[i] += grad.x[i];", "grad_bias[piece].x[i] = grad.x[i];"),
    ],
}
ADD_NORM = {
    "forward_row": [
        ("x.x[i] += bias.x[i];", ";"),
        ("drop(op, token, piece, x);", ""),
        ("residual.x[i] + x.x[i]", "x.x[i]"),
        ("row[piece], count);", "x, count);"),
        ("* rstd *", "*"),
        (" * weight.x[i]", ""),
        (" + norm_bias.x[i]", ""),
    ],
    "backward_row": [
        ("drop(op, token, piece, grad_x);", ""),
        ("Piece<N> grad_x = grad_y[piece];", "Piece<N> grad_x = grad_y[piece]; drop(op, token, piece, grad_x);"),
        ("grad_bias[piece].x[i] += grad_x.x[i];", "grad_bias[piece].x[i] = grad_x.x[i];"),
    ],
    "add_norm_backward": [("(2 + sum) * pieces", "(4 - sum) * pieces")],
}
LINEAR = {
    "": [
        ("product.bias == nullptr ? 0.0f : product.bias[column]", "0.0f"),
        ("tiles.whole * ROWS + tile - tiles.whole", "tiles.whole * ROWS"),
        ("tile, tiles.whole, nothing", "tile, 1, nothing"),
        ("tile * ROWS, 1, nothing", "tile, 1, nothing"),
        ("tile * ROWS, 1, fetch", "tile, 1, fetch"),
        ("token * product.out_stride", "token * product.out_features"),
        ("products[i].out + first * products[i].out_stride", "products[i].out"),
        ("x + first * in_features", "x"),
        ("first += size", "first += size + 1"),
        ("x.x + token * depth", "x.x"),
        ("part < ROWS", "part < PART"),
        ("(column + part * stride)", "column"),
        ("token + j, column", "token, column"),
    ],
}
ELEMENTS = {
    "": [
        ("(magnitude << 13) + (112u << 23)", "(magnitude << 13) + (113u << 23)"),
        ("(112u << 23)) >> 13", "(113u << 23)) >> 13"),
    ],
}
ROWS = {
    "load": [("i < count", "i < count - 1")],
    "store": [("i < count", "i < count - 1")],
    "for_pieces": [
        ("hidden % N != 0", "false"),
        ("int(hidden % N))", "int(hidden % N) - 1)"),
    ],
    "row_sum": [
        ("i < count", "i < N"),
        ("width > 0", "width > 1"),
    ],
    "centre": [
        ("row[piece].x[i] -= mean", "row[piece].x[i]"),
        ("row[piece].x[i] -= left", "row[piece].x[i]"),
        ("squares / float(hidden)", "squares / float(hidden - 1)"),
        (" + float(eps)", ""),
    ],
    "layer_norm_backward": [
        ("row[piece].x[i] *= rstd;", ""),
        (
            "grad_weight[piece].x[i] += grad_y[piece].x[i] * row[piece].x[i];",
            "grad_weight[piece].x[i] += grad_y[piece].x[i];",
        ),
        ("grad_weight[piece].x[i] +=", "grad_weight[piece].x[i] ="),
        ("grad_norm_bias[piece].x[i] +=", "grad_norm_bias[piece].x[i] ="),
        ("grad_y[piece].x[i] *= weight.x[i];", ""),
        ("rstd * (grad_y", "(grad_y"),
        (" - mean", ""),
        (" - row[piece].x[i] * slope", ""),
    ],
}
DROPOUT = {
    "philox": [
        ("round < 7", "round < 10"),
        ("c[1] = second, c[3] = first", "c[1] = first, c[3] = second"),
        ("k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;", ""),
    ],
    "draw": [("group + i / 4", "group")],
    "drop": [
        ("uint32_t(piece * (N / 4))", "0"),
        ("uint32_t(read(op.columns + token))", "uint32_t(token)"),
        ("column, sequence, 0)", "column, 0, 0)"),
        (">= threshold", "< threshold"),
        ("values.x[i] * rescale", "values.x[i]"),
    ],
}
ROWS_CPU = {
    "parallel_rows": [("i < end", "i < end - 1")],
    "for_chunk": [
        ("sums[piece] = {};", ";"),
        ("token < end &&", "token < end - 1 &&"),
        ("token < op.tokens", "token < op.tokens - 1"),
    ],
    "store_row": [("piece * Thread::piece, row[piece]", "0, row[piece]")],
}
FUNCTIONS = {
    "exponential": [
        ("1.0f / 24.0f", "1.0f / 25.0f"),
        (" - whole * -2.12194440e-4f", ""),
    ],
    "normal": [
        ("0.15916832f", "0.15926832f"),
        ("-0.5f * size * size", "-0.5f * size"),
    ],
}
INT8 = {
    "": [
        (" + COLUMNS - 1", ""),
        ("weight + groups * GROUP * COLUMNS, sizeof", "weight, sizeof"),
        ("product.scale + column", "product.scale"),
        ("product.bias[column + i]", "product.bias[i]"),
        ("block.columns * sizeof(float)", "sizeof(float)"),
    ],
    "rescale": [
        ("sums + first, sizeof found", "sums, sizeof found"),
        ("block.column_sums + first", "block.column_sums"),
        ("block.scale + first", "block.scale"),
        (" - token.zero * column_sums", ""),
        ("token.scale * load_vector", "load_vector"),
        ("Vector) * scale", "Vector) * token.scale * load_vector(block.scale + first)"),
    ],
    "store_row": [
        ("sums, block, i, token", "sums, block, 0, token"),
        ("block.bias + i", "block.bias"),
        ("to + i", "to"),
    ],
    "multiply_tile": [
        ("(first + i) * product.out_stride", "i * product.out_stride"),
        ("(first + i) * product.out_stride", "(first + i) * product.out_features"),
        ("x.rows + first * x.stride", "x.rows"),
        ("x.roundings[first + i]", "x.roundings[i]"),
    ],
    "multiply_tokens": [
        (" + Kernel::MOST_ROWS - 1", ""),
        ("i < last", "i < last - 1"),
    ],
    "packed_linear_forward": [
        ("op->x + first * op->in_features", "op->x"),
        ("op->out + first * op->out_stride", "op->out"),
    ],
}
INT8_TILE = {
    "": [
        ("x + i * stride + group * GROUP;", "x + i * stride;"),
        ("column * GROUP + k", "column * GROUP"),
    ]
}
# Compiled for these capabilities only.
CAPABILITIES = ("AVX2", "AVX512")
INT8_VECTORS = {
    "": [
        ("x + i * stride + group * GROUP)", "x + i * stride)"),
        ("x + i * stride + group * GROUP)", "x + group * GROUP)"),
        ("(group * COLUMNS + first + j * LANES) * GROUP", "(group * COLUMNS + j * LANES) * GROUP"),
        ("i * COLUMNS + first + j * LANES", "i * COLUMNS + j * LANES"),
        ("LEVELS = 127", "LEVELS = 255"),
    ],
}
INT8_BLOCKS = {
    "for_token_blocks": [
        ("first += most)", "first += most + 1)"),
        ("end - first", "end - first - 1"),
    ]
}
# Where the processor has them.
AMX = {
    "": [
        ("x + AMX_ROWS * stride + group * GROUP", "x + group * GROUP"),
        ("block + group * ROW + AMX_BYTES", "block + group * ROW"),
        ("_tile_loadd(2, lower, ROW);", ""),
        ("_tile_stored(3, lower + AMX_ROWS, ROW);", ""),
        ("block + skipped", "block"),
        ("x + whole * GROUP", "x"),
        ("groups * GROUP : AMX_BYTES", "AMX_BYTES : AMX_BYTES"),
    ]
}
FLOATS = {
    "": [
        ("features * sizeof(float);", "features * sizeof(float) + GROUP;"),
        ("rows = reinterpret_cast<const uint8_t*>(x);", "rows = reinterpret_cast<const uint8_t*>(x + 1);"),
    ],
}
BFLOAT16 = {
    "": [
        ("sizeof(BFloat16) : features, GROUP", "sizeof(BFloat16) : features, 1"),
        ("product.scale == nullptr ? 0 : sizeof column_sums", "sizeof column_sums"),
        ("return load_vector(sums + first);", "return load_vector(sums);"),
    ],
    "round_row": [("from_float(x[i], row[i])", "row[i].bits = as_bits(x[i]) >> 16")],
}
QUANTISE = {
    "": [
        ("include(rest);", ";"),
        ("below() + ", ""),
        (" + total(poison)", ""),
        ("-x > below_zero ? -x : below_zero", "below_zero"),
        ("x > above_zero ? x : above_zero", "x"),
        ("!(scale >= FLT_MIN)", "!(scale >= 0.0f)"),
        ("scale < FLT_MIN ? 0.0f : NAN", "0.0f"),
        ("scale < FLT_MIN ? 0.0f : NAN", "NAN"),
        ("1.0f / scale, zero", "float(levels) / range.size(), zero"),
        ("rintf(range.below() * inverse)", "range.below() * inverse"),
        ("rintf(x[i] * inverse)", "x[i] * inverse"),
        ("value > most ? most : value", "value"),
    ]
}
PACKED_LAYER = {
    "": [
        ("layer.k_bias, qkv + projected", "layer.q_bias, qkv + projected"),
        ("layer.v_bias, qkv + 2 * projected", "nullptr, qkv + 2 * projected"),
        ("layer.v_packed, layer.v_scale", "layer.k_packed, layer.v_scale"),
        ("x, norm1, count", "x, norm2, count"),
        ("add_norm(attended, x", "add_norm(residual, x"),
        ("multiply(attended, hidden", "multiply(x, hidden"),
        ("activate(activations, count, inner, layer.activation, run);", ""),
        ("layer.down_scale, layer.down_bias", "layer.down_scale, nullptr"),
    ],
    "run_with": [
        ("x + first * hidden, count, qkv", "x, count, qkv"),
        ("qkv + first * 3 * projected", "qkv"),
        ("context + first * projected", "context"),
        ("x + first * hidden, count, out", "x, count, out"),
        ("out + first * hidden", "out"),
        ("attend(op, layer, qkv, context, dtype, run);", ""),
    ],
}
# Where the processor multiplies bfloat16.
NARROW_LAYER = {
    "": [
        ("convert(wide.get(), size, qkv, run);", "convert(wide.get(), layer.projected, qkv, run);"),
        ("convert(context, size, wide.get(), run);", "convert(context, layer.projected, wide.get(), run);"),
    ],
    "run_layer": [("== BFLOAT16", "!= BFLOAT16")],
}
LAYER = {
    "run_layers": [
        ("i == 0 ? op.x : op.out", "op.x"),
        ("i < op.count; ++i) {", "i < 1; ++i) {"),
        ("run_layer(op, layer(i)", "run_layer(op, layer(0)"),
    ],
    "attend": [
        ("attention.key_bias = op.key_bias;", ""),
        ("attention.key_ranges = op.key_ranges;", ""),
        ("attention.scale = layer.scale;", ""),
    ],
    "add_norm": [
        ("op.norm_bias = norm.bias;", "op.norm_bias = norm.weight;"),
        ("op.eps = norm.eps;", ""),
    ],
    "activate": [("op.activation = activation;", "")],
}


MUTANTS = (
    ("embeddings", "embeddings.h", EMBEDDINGS),
    ("attention", "attention_cpu.cpp", ATTENTION),
    ("attention", "attention_task.h", ATTENTION_TASK),
    *((("attention", "attention_bfloat16.h", ATTENTION_BFLOAT16),) if products.multiplies(torch.bfloat16) else ()),
    ("bias_gelu", "bias_gelu_cpu.cpp", BIAS_GELU),
    ("add_norm", "add_norm_cpu.cpp", ADD_NORM),
    ("product", "linear_cpu.cpp", LINEAR),
    ("add_norm", "elements.h", ELEMENTS),
    ("add_norm", "rows.h", ROWS),
    ("add_norm", "dropout.h", DROPOUT),
    ("attention", "dropout.h", {"draw": [("Wide() + head", "Wide()")]}),
    ("bias_gelu", "rows_cpu.h", ROWS_CPU),
    ("bias_gelu", "functions.h", FUNCTIONS),
    ("int8", "packed_cpu.cpp", INT8),
    ("int8", "packed_tile.h", INT8_TILE),
    *((("int8", "packed_tile.h", INT8_VECTORS),) if torch.backends.cpu.get_cpu_capability() in CAPABILITIES else ()),
    *(
        (("int8", "packed_tile.h", AMX),)
        if library.is_built("cpu") and "amx_int8" in products.kernels(torch.int8)
        else ()
    ),
    ("int8", "packed.h", INT8_BLOCKS),
    ("int8", "quantise.h", QUANTISE),
    *((("floats", "packed_cpu.cpp", FLOATS),) if products.multiplies(torch.float32) else ()),
    *((("floats", "packed_cpu.cpp", BFLOAT16),) if products.multiplies(torch.bfloat16) else ()),
    ("packed_layer", "packed_layer_cpu.cpp", PACKED_LAYER),
    *((("packed_layer", "packed_layer_cpu.cpp", NARROW_LAYER),) if products.multiplies(torch.bfloat16) else ()),
    ("packed_layer", "layer.h", LAYER),
)


def mutate(source, function, old, new):
    """The source of a file with the one occurrence of `old` replaced: in a function, or where it has no name."""
    body = source
    if function:
        # From the line that has its type and name to the next brace that closes at that line's indentation.
        definition = rf'^( *)(?!return|case| )[\w:<>*&" ]+ \*?{function}\([^;{{]*\{{\n.*?^\1\}}'
        ((start, end),) = (match.span() for match in re.finditer(definition, source, re.MULTILINE | re.DOTALL))
        body = source[start:end]
    return replaced(source, body, old, new)


FLAGS = [*compiler.cpu_flags(torch.backends.cpu.get_cpu_capability()), "-O0", "-w"]


@pytest.fixture(scope="module")
def system_headers(tmp_path_factory):
    """All headers of csrc/ that are not its own, compiled once; reading them takes half of a file's time."""
    header = tmp_path_factory.mktemp("system_headers") / "system.h"
    sources = [*compiler.SOURCES.glob("*_cpu.cpp"), *compiler.SOURCES.glob("*.h")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    names = sorted({*re.findall(r"^#include (<(?!cuda).*>)", text, re.MULTILINE)})
    header.write_text("".join(f"#if __has_include({name})\n#include {name}\n#endif\n" for name in names))
    compiled = header.with_suffix(".h.gch")
    command = [*compiler.cpp(), *FLAGS, "-x", "c++-header", str(header), "-o", str(compiled)]
    subprocess.run(command, check=False)  # a compiler that cannot do so reads the headers each time
    return str(header)


@pytest.fixture
def install(tmp_path, monkeypatch, system_headers):
    """Compiles an op's file of a changed copy of csrc/, for the process to load it in the library's place."""

    def install(op, file=None, *replacement):
        sources = shutil.copytree(compiler.SOURCES, tmp_path / "csrc")
        if file is not None:
            path = sources / file
            path.write_text(mutate(path.read_text(encoding="utf-8"), *replacement), encoding="utf-8")
        built = tmp_path / "library.so"
        source = str(sources / FILE_OF_OP[op])
        # What the file calls of others, such as a layer its ops, is that of the unchanged library.
        files = [source, str(library.path("cpu"))]
        command = [*compiler.cpp(), *FLAGS, "-include", system_headers, *files, "-o", str(built)]
        subprocess.run(command, check=True)
        monkeypatch.setattr(library, "path", lambda device: built)

    return install


@pytest.fixture
def two_threads():
    """Where blocks of tokens begin depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def holds_everywhere(op, *place):
    """Whether all checks of an op find nothing; the first that finds something is the last.

    Args:
        op: a key of `FILE_OF_OP`.
        place: of a mutant; see `is_caught`.
    """
    if op == "floats":
        return are_all_exact()
    if op == "packed_layer":
        return (
            all(map(is_its_ops, BATCHES.values()))
            and is_its_ops(BATCHES["one token"], "relu")
            and (
                not products.multiplies(torch.float32)
                or all(is_its_ops(batch, linears=layer_linears(torch.float32)) for batch in BATCHES.values())
            )
            and are_one_after_another()
        )
    return not is_caught([check for check in CHECKS if check.op == op], *place)


@pytest.mark.parametrize("op", FILE_OF_OP)
def test_unchanged_sources_survive(op, install, two_threads):
    install(op)
    assert holds_everywhere(op)


@pytest.mark.parametrize(("op", "file", "function", "old", "new"), list(parameters(MUTANTS)))
def test_no_mutant_survives(op, file, function, old, new, install, two_threads):
    install(op, file, function, old, new)
    assert not holds_everywhere(op, file, function)
