"""Kernels that are broken on purpose: the battery of `python -m erniem_fast verify` catches every one.

A mutant is a kernel's source with one text replaced, imported in the place of its module. Those that do nothing but
round a value are left to `test_rounding.py`.
"""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from erniem_fast import kernels
from erniem_fast.verification.battery import battery
from tests.kernels.rounding import ERRORS, rounds_little
from tests.mutation import holds, is_caught, parameters, replaced

KERNELS = Path(kernels.__path__[0])
OPS = ("attention", "bias_gelu", "add_norm")  # each has the name of its file

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of numbers that overflow in a mutant

# What is replaced, and by what. In both tiles that make the gradients of keys and values:
OF_KEYS = [
    ("tl.dot(value, tl.trans(grad)", "tl.dot(key, tl.trans(grad)"),
    ("tl.where(dropout_mask, probabilities, 0.0)", "probabilities"),
    ("dropped * grad_probabilities", "probabilities * grad_probabilities"),
    (" - probabilities * delta", ""),
]
# In both kernels that store them:
OF_STORES = [
    ("grad_key * (scale * rescale)", "grad_key * rescale"),
    ("grad_key * (scale * rescale)", "grad_key * scale"),
    ("grad_value * rescale", "grad_value"),
]
# In both kernels that stream keys:
OF_KEYS_ADDRESS = [
    ("first_key_ptr + begin * (3 * HIDDEN)", "first_key_ptr"),
    ("key_ptr += STEP * 3 * HIDDEN", "key_ptr += STEP * HIDDEN"),
]
# In all kernels that stream tiles in one loop, and what remains in another:
OF_TAIL = [
    ("tl.range(whole, end, STEP", "tl.range(whole, end - 1, STEP"),
    ("WHOLE=False", "WHOLE=True"),
]
# And of all kernels, by file and function:
ATTENTION = {
    "_element_mask": [
        ("row < length", "row < length - 1"),
        ("< HEAD_DIM)", "< HEAD_DIM - 1)"),
    ],
    "_load": [("mask=_element_mask(row, length,", "mask=_element_mask(row, length - 1,")],
    "_store": [("mask=_element_mask(row, length,", "mask=_element_mask(row, length - 1,")],
    "_key_bias": [
        ("key < length", "key <= length"),
        ("key < length", "key < length - 1"),
        ("key_bias_ptr + start + key", "key_bias_ptr + key"),
    ],
    "_scaled": [
        ("tl.fma(scores, scale, key_bias)", "scores + key_bias"),
        ("tl.fma(scores, scale, key_bias)", "scores * scale"),
    ],
    "_factor": [
        ("LOG2_E if", "scale * LOG2_E if"),
        ("else scale * LOG2_E", "else LOG2_E"),
        ("else scale * LOG2_E", "else scale"),
    ],
    "_key_range": [
        ("2 * start.to(tl.int64)", "0"),
        ("2 * query + 1", "2 * query"),
        ("tl.minimum(end, length)", "end"),
    ],
    "_is_seen": [
        ("2 * start.to(tl.int64)", "0"),
        ("key >= first[None, :]", "key > first[None, :]"),
        ("key < tl.minimum(end, length)[None, :]", "key <= tl.minimum(end, length)[None, :]"),
        ("tl.minimum(end, length)", "end"),
    ],
    "_seen_keys": [
        ("// STEP * STEP", "// STEP * STEP + STEP"),
        ("tl.max(end)", "tl.max(end) - 1"),
        ("tl.max(end)", "tl.min(end)"),
    ],
    "_seeing_queries": [
        ("first < first_key + KEYS", "first < first_key"),
        ("end > first_key", "end > first_key + KEYS"),
        ("query + 1, 0", "query, 0"),
        ("least // STEP * STEP", "least // STEP * STEP + STEP"),
        ("tl.minimum(least, tl.min", "(tl.min"),
        ("tl.maximum(most, tl.max", "(tl.max"),
    ],
    "_dropout_mask": [
        ("first_key // 4 + tl", "tl"),
        ("groups, query, sequence, head", "groups, query, 0, head"),
        ("groups, query, sequence, head", "groups, query, sequence, 0"),
        ("groups, query, sequence, head", "groups, 0, sequence, head"),
        ("key_column, query_column, sequence", "key, query_column, sequence"),
        ("key_column, query_column, sequence", "key_column, query, sequence"),
    ],
    "_scores": [
        ("length - first_key", "length"),
        ("index = interleaved(index)", "pass"),
        ("scores = _scaled", "_scaled"),
        ("column >= key_range[0]", "column > key_range[0]"),
        ("column < key_range[1]", "column <= key_range[1]"),
        ("column < length", "column <= length"),
        ("column < length", "column < length - 1"),
        ("and not WHOLE", "and WHOLE"),
    ],
    "_forward_tile": [
        ("[:, None] * -factor", "[:, None] * factor"),
        ("tl.fma(scores, factor, less)", "tl.fma(scores, factor, offset)"),
        ("tl.exp2(less - offset)", "tl.exp2(offset - less)"),
        ("total * shrink + tl.sum", "total + tl.sum"),
        ("acc=out * shrink", "acc=out"),
        ("tl.where(dropout_mask, probabilities, factor - factor)", "probabilities"),
        ("factor - factor", "factor"),
    ],
    "_forward_kernel": [
        ("LARGEST_FLOAT", 'float("inf")'),
        ("_factor(scale, key_bias_ptr)", "_factor(1.0, key_bias_ptr)"),
        ("_factor(scale, key_bias_ptr)", "_factor(scale, None)"),
        ("tl.where(total == 0.0, 1.0, total)", "total"),
        ("else inverse * rescale", "else inverse"),
        ("offset, mask=row < length)", "offset, mask=row < length - 1)"),
        ("inverse, mask=row < length)", "inverse, mask=row < length - 1)"),
        ("HEADS * tokens, inverse", "HEADS * tokens, 1.0 + 0.0 * inverse"),
        ("tl.range(begin, whole, STEP", "tl.range(begin + STEP, whole, STEP"),
        ("tl.range(begin, whole, STEP", "tl.range(begin, whole - STEP, STEP"),
        ("if whole < end:", "if whole < end - 1:"),
        ("first_key_ptr + whole * (3 * HIDDEN)", "first_key_ptr"),
        *OF_KEYS_ADDRESS,
        ("WHOLE=False", "WHOLE=True"),
    ],
    "_load_number": [("row < length", "row < length - 1")],
    "_delta": [(" / tl.maximum(rescale, 1.0)", "")],
    "_queries_tile": [
        ("tl.fma(scores, factor, offset)", "scores * factor"),
        ("tl.dot(grad, tl.trans(value)", "tl.dot(query, tl.trans(value)"),
        ("tl.where(dropout_mask, exponentials, 0.0)", "exponentials"),
        ("dropped * grad_probabilities", "exponentials * grad_probabilities"),
        (" - exponentials * delta", ""),
    ],
    "_backward_queries_kernel": [
        ("scale * rescale * inverse", "rescale * inverse"),
        ("scale * rescale * inverse", "scale * inverse"),
        ("scale * rescale * inverse", "scale * rescale"),
        ("_factor(scale, key_bias_ptr)", "_factor(1.0, key_bias_ptr)"),
        ("_factor(scale, key_bias_ptr)", "_factor(scale, None)"),
        ("offset, mask=row < length", "offset, mask=row < length - 1"),
        ("inverse, mask=row < length", "inverse, mask=row < length - 1"),
        ("delta, mask=row < length", "delta, mask=row < length - 1"),
        ("tl.range(begin, whole, STEP", "tl.range(begin + STEP, whole, STEP"),
        ("first_key_ptr + first_key * (3 * HIDDEN)", "first_key_ptr"),
        *OF_KEYS_ADDRESS,
        *OF_TAIL,
    ],
    "_load_numbers": [
        ("row < length", "row < length - 1"),
        ("if WHOLE else", "if not WHOLE else"),
        ("inverse, _ =", "_, inverse ="),
        ("offset, delta =", "delta, offset ="),
    ],
    "_keys_tile": [
        *OF_KEYS,
        ("tl.fma(scores, factor, offset)", "scores * factor"),
        (" * inverse", ""),
        ("scores = _scaled(scores, scale, key_bias)", "pass"),
        ("tl.where(_is_seen(column, key_ranges_ptr, start, row, length), probabilities, 0.0)", "probabilities"),
    ],
    "_backward_keys_kernel": [
        *OF_STORES,
        ("_factor(scale, key_bias_ptr)", "_factor(1.0, key_bias_ptr)"),
        ("_factor(scale, key_bias_ptr)", "_factor(scale, None)"),
        ("tl.range(begin, whole, STEP", "tl.range(begin + STEP, whole, STEP"),
        *OF_TAIL,
    ],
    "_backward_kernel": [
        *OF_KEYS,
        *OF_STORES,
        ("_factor(scale, key_bias_ptr)", "_factor(1.0, key_bias_ptr)"),
        ("_factor(scale, key_bias_ptr)", "_factor(scale, None)"),
        (" * inverse", ""),
        ("scores = _scaled(scores, scale, key_bias)", "pass"),
        ("tl.where(row < length, probabilities, 0.0)", "probabilities"),
        ("tl.where(seen, probabilities, 0.0)", "probabilities"),
        ("grad_query * (scale * rescale)", "grad_query * scale"),
        ("if first > 0:", "if first < 0:"),
        ("if first + BLOCK < length:", "if first + BLOCK < length - BLOCK:"),
        ("if first + BLOCK >= length:", "if first + BLOCK > length:"),
        ("else length, STEP", "else length - 1, STEP"),
        ("else length, BLOCK", "else length - 1, BLOCK"),
    ],
    "backward": [("min(config.block, config.step)", "max(config.block, config.step)")],
}
BIAS_GELU = {
    "_normal_cdf": [
        ("tl.abs(x)", "x"),
        ("-1.0 - p * t", "-p * t"),
        ("x < 0.0", "x > 0.0"),
        ("1.0 - tail", "tail"),
    ],
    "_activate": [
        ("tl.maximum(x, 0.0)", "x"),
    ],
    "_derivative": [
        (" + x * density", ""),
        ("_normal_cdf(x) + ", ""),
        (" - 1.3257480647361593", ""),
        ("-0.7213475204444817", "-0.5"),
        ("+ x * sigmoid * (1.0 - sigmoid) * slope", ""),
        ("tl.where(x > 0.0, 1.0, 0.0)", "1.0"),
    ],
    "_load_bias": [("features < FEATURES", "features < FEATURES - 1")],
    "_forward_kernel": [
        ("x += bias", "x += 0.0"),
        ("out = drop_features(out, seed, threshold, rescale, column, sequence, block, BLOCK)", "pass"),
        ("column, sequence, block, BLOCK", "rows.to(tl.int32), sequence, block, BLOCK"),
        ("column, sequence, block, BLOCK", "column, 0, block, BLOCK"),
        ("column, sequence, block, BLOCK", "column, sequence, 0, BLOCK"),
        ("(rows < tokens) &", "(rows < tokens - 1) &"),
        ("& (features < FEATURES)", "& (features < FEATURES - 1)"),
        ("tl.minimum(first + rows_per_program, tokens)", "tl.minimum(first + rows_per_program - ROWS, tokens)"),
    ],
    "_backward_kernel": [
        ("x += bias", "x += 0.0"),
        ("grad_x = drop_features(grad_x, seed, threshold, rescale, column, sequence, block, BLOCK)", "pass"),
        ("column, sequence, block, BLOCK", "column, sequence, 0, BLOCK"),
        ("grad_x *= _derivative(x, ACTIVATION)", "pass"),
        ("grad_bias += grad_x", "grad_bias = grad_x"),
        ("(rows < tokens) &", "(rows < tokens - 1) &"),
        ("sums, mask=features < FEATURES", "sums, mask=features < FEATURES - 1"),
        ("tl.minimum(first + rows_per_program, tokens)", "tl.minimum(first + rows_per_program - ROWS, tokens)"),
    ],
}
ADD_NORM = {
    "_load_vector": [("features < HIDDEN", "features < HIDDEN - 1")],
    "_load_rows": [
        ("(rows < tokens)", "(rows < tokens - 1)"),
        ("(features < HIDDEN)", "(features < HIDDEN - 1)"),
    ],
    "_store_rows": [
        ("(rows < tokens)", "(rows < tokens - 1)"),
        ("(features < HIDDEN)", "(features < HIDDEN - 1)"),
    ],
    "_dropout": [("sequence, chunk, BLOCK", "sequence, 0, BLOCK")],
    "_row_sums": [("tl.static_range(1, CHUNKS)", "tl.static_range(2, CHUNKS)")],
    "_normalise": [
        (" + eps", ""),
        (
            "_multiply(centred, centred, CHUNKS), CHUNKS) / HIDDEN",
            "_multiply(centred, centred, CHUNKS), CHUNKS) / (HIDDEN - 1)",
        ),
        ("tl.where(real, tl.rsqrt(variance + eps), 0.0)", "tl.rsqrt(variance + eps)"),
    ],
    "_subtract": [
        ("z[chunk] - mean, 0.0", "z[chunk], 0.0"),
        ("tl.where(_features(chunk, BLOCK) < HIDDEN, z[chunk] - mean, 0.0)", "z[chunk] - mean"),
    ],
    "_forward_kernel": [
        ("x = _add(x, _load_vector(bias_ptr, HIDDEN, ROWS, BLOCK, CHUNKS), CHUNKS)", "pass"),
        ("x = _dropout(x, seed, threshold, rescale, column, sequence, BLOCK, CHUNKS)", "pass"),
        ("_add(z, x, CHUNKS)", "x"),
        ("z_ptr, rows, tokens, z,", "z_ptr, rows, tokens, x,"),
        ("_multiply(normal, weight, CHUNKS)", "normal"),
        ("_add(_multiply(normal, weight, CHUNKS), norm_bias, CHUNKS)", "_multiply(normal, weight, CHUNKS)"),
        ("tl.program_id(0) * ROWS", "tl.program_id(0) * (ROWS - 1)"),
    ],
    "_backward_kernel": [
        ("_add(grad_weight, _multiply(grad, normal, CHUNKS), CHUNKS)", "_multiply(grad, normal, CHUNKS)"),
        ("_multiply(grad, normal, CHUNKS)", "grad"),
        ("_add(grad_norm_bias, grad, CHUNKS)", "grad"),
        ("_multiply(grad, weight, CHUNKS)", "grad"),
        (" - mean", ""),
        (" - normal[chunk] * slope", ""),
        (") * rstd", ")"),
        ("_dropout(grad_z, seed, threshold, rescale, column, sequence, BLOCK, CHUNKS)", "grad_z"),
        ("_add(grad_bias, grad_x, CHUNKS)", "grad_x"),
        ("_add(grad_bias, grad_z, CHUNKS)", "grad_z"),
        ("tl.minimum(first + rows_per_program, tokens)", "tl.minimum(first + rows_per_program - ROWS, tokens)"),
        ("sums = tl.program_id(0) * ROWS", "sums = tl.program_id(0)"),
        ("count = tl.num_programs(0) * ROWS", "count = tl.num_programs(0)"),
        ("partials_ptr + count * HIDDEN, sums, count, grad_weight", "partials_ptr, sums, count, grad_weight"),
        ("partials_ptr + 2 * count * HIDDEN", "partials_ptr + count * HIDDEN"),
    ],
    "_sum_kernel": [
        ("vector * count * HIDDEN", "vector * HIDDEN"),
        ("rows < count", "rows < count - 1"),
        ("(features < HIDDEN)[None, :]", "(features < HIDDEN - 1)[None, :]"),
        ("grad_bias_ptr + features, total", "grad_weight_ptr + features, total"),
        ("vector == 0", "vector == 2"),
        ("vector == 1", "vector != 1"),
    ],
}
DROPOUT = {
    "launch_arguments": [
        ("dropout.rescale(of.p)", "1.0"),
        ("dropout.threshold(of.p)", "dropout.threshold(of.p / 2)"),
    ],
    "dropout_mask": [
        ("tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
        (">= threshold", "< threshold"),
        ("n_rounds=ROUNDS", "n_rounds=10"),
    ],
}
DROPOUT_OF_ATTENTION = {
    "dropout_mask": [("[0, 1, 3, 2, 4]", "[0, 1, 2, 3, 4]")],
    "interleaved": [("index % 8 // 2 * 4 + index % 16 // 8 * 2", "index % 16 // 2 * 2")],
}
DROPOUT_OF_FEATURES = {
    "drop_features": [
        ("x * rescale", "x"),
        ("block * (BLOCK // 4)", "block * BLOCK"),
        ("tl.where(dropout_mask(seed, threshold, groups, column, sequence, 0), x * rescale, 0.0)", "x * rescale"),
    ],
}
DROPOUT_OF_COLUMNS = {
    "dropout_mask_of_columns": [
        ("last // 4", "last"),
        ("last % 4 == 1", "last % 4 == 3"),
        ("n_rounds=ROUNDS", "n_rounds=10"),
    ],
}


QUANTISE = {
    "quantise": [("max(1, cdiv(tokens, config.rows))", "max(1, tokens // config.rows)")],
    "dequantise": [
        ("max(1, cdiv(tokens, config.rows))", "max(1, tokens // config.rows)"),
        ("cdiv(features, config.block)", "max(1, features // config.block)"),
    ],
    "_quantise_kernel": [
        ("tl.program_id(0) * ROWS", "tl.program_id(0)"),
        ("features < FEATURES", "features < FEATURES - 1"),
        ("size = tl.abs(x)", "size = x"),
        ("tl.div_rn(size, LARGEST)", "size * (1.0 / LARGEST)"),
        ("tl.where(scale < _LEAST_SCALE, 0.0, scale)", "scale"),
        ('tl.where(size < float("inf"), scale, float("nan"))', "scale"),
        ("tl.where(scale > 0.0, x * inverse, 0.0)", "x * inverse"),
        ("(values + _WHOLE_NUMBERS) - _WHOLE_NUMBERS", "tl.floor(values + 0.5)"),
        ("(values + _WHOLE_NUMBERS) - _WHOLE_NUMBERS", "values"),
        ("scale, mask=rows < tokens)", "scale, mask=rows < tokens - 1)"),
    ],
    "_dequantise_kernel": [
        ("tl.program_id(0) // blocks * ROWS", "tl.program_id(0) // blocks"),
        ("tl.program_id(0) % blocks * BLOCK", "tl.program_id(0) % blocks"),
        ("(scale * weight_scale)", "scale"),
        ("(scale * weight_scale)", "weight_scale"),
        ("out += tl.load", "tl.load"),
        ("(rows < tokens) & (features < FEATURES)", "(rows < tokens - 1) & (features < FEATURES)"),
        ("(rows < tokens) & (features < FEATURES)", "(rows < tokens) & (features < FEATURES - 1)"),
        ("tl.load(scale_ptr + rows, mask=rows < tokens", "tl.load(scale_ptr + rows, mask=rows < tokens - 1"),
        ("mask=features < FEATURES, other=0.0)\n    out", "mask=features < FEATURES - 1, other=0.0)\n    out"),
    ],
}
MUTANTS = (
    ("attention", "attention", ATTENTION),
    ("bias_gelu", "bias_gelu", BIAS_GELU),
    ("add_norm", "add_norm", ADD_NORM),
    ("quantise", "quantise", QUANTISE),
    *((op, "dropout", DROPOUT) for op in OPS),
    *((op, "dropout", DROPOUT_OF_FEATURES) for op in ("bias_gelu", "add_norm")),
    ("attention", "dropout", DROPOUT_OF_ATTENTION),
    ("attention", "dropout", DROPOUT_OF_COLUMNS),
)

# In float32 alone, whose digits show what bfloat16 rounds off anyway:
DIGITS = (
    (
        "attention",
        "attention",
        {
            "_forward_tile": [("tl.fma(scores, factor, less)", "scores * factor + less")],
            "_queries_tile": [("tl.fma(scores, factor, offset)", "scores * factor + offset")],
            "_keys_tile": [
                ("tl.fma(scores, factor, offset)", "scores * factor + offset"),
                (
                    "tl.exp2(tl.fma(scores, factor, offset)) * inverse",
                    "tl.exp2(tl.fma(scores, factor, offset + tl.log2(inverse)))",
                ),
            ],
            "_backward_kernel": [("tl.fma(scores, factor, offset)", "scores * factor + offset")],
        },
    ),
    (
        "bias_gelu",
        "bias_gelu",
        {
            "_normal_cdf": [
                ("t * 1.9792705643340014e-06", "0.0"),
                (" - 2.9772985726594925e-05", ""),
                ("0.45919114351272583", "0.4592"),
                ("1.1511067152023315", "1.1511"),
            ],
            "_activate": [
                ("_normal_cdf(x)", "tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))"),
                ("0.044715 * x * x * x", "0.0"),
            ],
            "_derivative": [
                ("0.134145 * x * x", "0.044715 * x * x"),
            ],
        },
    ),
    (
        "add_norm",
        "add_norm",
        {
            "_normalise": [
                ("_row_sums(z, CHUNKS) / HIDDEN", "0.0"),
                ("tl.div_rn(_row_sums(centred, CHUNKS), HIDDEN * 1.0)", "0.0"),
            ],
        },
    ),
)
# In bfloat16 alone: operands of a product that are left in float32,
CASTS = {
    "_forward_tile": [("probabilities.to(value.dtype)", "probabilities")],
    "_queries_tile": [("grad_scores.to(key.dtype)", "grad_scores")],
    "_keys_tile": [
        ("dropped.to(grad.dtype)", "dropped"),
        ("grad_scores.to(query.dtype)", "grad_scores"),
    ],
    "_backward_kernel": [
        ("dropped.to(grad.dtype)", "dropped"),
        (
            "(dropped * grad_probabilities - probabilities * delta).to(query.dtype)",
            "dropped * grad_probabilities - probabilities * delta",
        ),
    ],
}
# and values that are rounded though they need not be.
ROUNDINGS = (
    (
        "attention",
        "attention",
        {
            "_scores": [
                ("(key), input_precision=PRECISION)", "(key), input_precision=PRECISION).to(key.dtype).to(tl.float32)"),
            ],
            "_forward_tile": [
                ("acc=out * shrink", "acc=(out * shrink).to(value.dtype).to(tl.float32)"),
            ],
            "_queries_tile": [
                ("(value), input_precision=PRECISION)", "(value), input_precision=PRECISION).to(key.dtype)"),
                ("acc=grad_query", "acc=grad_query.to(key.dtype).to(tl.float32)"),
            ],
            "_keys_tile": [
                ("(query), input_precision=PRECISION)", "(query), input_precision=PRECISION).to(key.dtype)"),
                ("(grad), input_precision=PRECISION)", "(grad), input_precision=PRECISION).to(key.dtype)"),
                ("acc=grad_key", "acc=grad_key.to(key.dtype).to(tl.float32)"),
            ],
            "_backward_kernel": [
                ("(grad), input_precision=PRECISION)", "(grad), input_precision=PRECISION).to(key.dtype)"),
                ("acc=grad_value", "acc=grad_value.to(key.dtype).to(tl.float32)"),
            ],
            "forward": [("tokens, dtype=torch.float32", "tokens, dtype=qkv.dtype")],
            "backward": [
                ("head_dim, dtype=torch.float32", "head_dim, dtype=qkv.dtype"),
                ("4, dtype=torch.float32", "4, dtype=qkv.dtype"),
            ],
        },
    ),
    (
        "bias_gelu",
        "bias_gelu",
        {
            "_forward_kernel": [("x += bias", "x = (x + bias).to(x_ptr.dtype.element_ty).to(tl.float32)")],
            "backward": [("features, dtype=torch.float32", "features, dtype=x.dtype")],
        },
    ),
    ("add_norm", "add_norm", {"backward": [("dtype=torch.float32", "dtype=z.dtype")]}),
)


def mutate(source, function, old, new):
    """The source of a file with the one occurrence of `old` in a function replaced."""
    (body,) = re.findall(rf"^def {function}\(.*?(?=\n\n\n|\Z)", source, re.MULTILINE | re.DOTALL)
    return replaced(source, body, old, new)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Imports a source as a module of the kernels, in the place of the one that has its name."""

    def install(name, source):
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = spec_from_file_location(f"erniem_fast.kernels.{name}", path)
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)

    return install


def source_of(name):
    return (KERNELS / f"{name}.py").read_text(encoding="utf-8")


def checks_of(op, dtype):
    """Those on kernels of Triton, on the CPU, where they are interpreted."""
    return [
        check
        for check in battery(torch.device("cpu"))
        if (check.op, check.implementation, check.dtype) == (op, "triton", dtype)
    ]


@pytest.mark.parametrize("op", OPS)
def test_unchanged_kernels_survive(op, install):
    for name in ("dropout", op):
        install(name, source_of(name))
    assert holds(checks_of(op, torch.float32)[0])
    assert rounds_little(op, next(iter(ERRORS[op])))


@pytest.mark.parametrize(("op", "file", "function", "old", "new"), list(parameters(MUTANTS)))
def test_no_mutant_survives(op, file, function, old, new, install):
    """In bfloat16, in which models run on GPUs, and which takes half of float32's time."""
    install(file, mutate(source_of(file), function, old, new))
    if file == "dropout":
        install(op, source_of(op))
    assert is_caught(checks_of(op, torch.bfloat16), op, function)


@pytest.mark.parametrize(("op", "file", "function", "old", "new"), list(parameters(DIGITS)))
def test_no_digit_is_lost(op, file, function, old, new, install):
    install(file, mutate(source_of(file), function, old, new))
    assert is_caught(checks_of(op, torch.float32), op, function)


@pytest.mark.parametrize(
    ("op", "file", "function", "old", "new"), list(parameters([("attention", "attention", CASTS)]))
)
def test_no_operand_stays_in_float32(op, file, function, old, new, install):
    """Nothing in float32 shows it; in bfloat16 the kernel cannot be compiled."""
    install(file, mutate(source_of(file), function, old, new))
    with pytest.raises(InterpreterError, match="same dtype"):
        all(holds(check) for check in checks_of(op, torch.bfloat16))


@pytest.mark.parametrize(("op", "file", "function", "old", "new"), list(parameters(ROUNDINGS)))
def test_no_needless_rounding_survives(op, file, function, old, new, install):
    install(file, mutate(source_of(file), function, old, new))
    assert not all(rounds_little(op, shape) for shape in ERRORS[op])
