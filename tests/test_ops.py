"""The four ops: every implementation that a CPU runs, against float64 and in awkward places.

Triton's interpreter is slow and has tests of its own; here it joins where inputs are small.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erniem_fast import flags, ops, reference, use_kernels
from erniem_fast.batch import TokenBatch
from erniem_fast.dropout import dropout_mask
from erniem_fast.flags import use_implementations
from erniem_fast.ops import Product
from erniem_fast.ops.choose import arguments_of
from erniem_fast.reference import Norm

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SEED = torch.tensor([0x299F31D0A4093822])
EPS = 1e-5
PADDING = 1  # the row of both tables without a gradient


def serving(op, dtype=torch.float32, interpreted=False):
    """The implementations that serve this dtype on a CPU, with those in Triton's interpreter if asked for."""
    return [
        name
        for name, each in ops.IMPLEMENTATIONS[op].items()
        if each.objection(CPU, dtype, size=64) is None and (each.automatic(CPU) or interpreted)
    ]


def each_implementation(op, interpreted=False):
    """Parametrises a test over the implementations of an op, and the dtypes that they serve."""
    pairs = [
        pytest.param(name, dtype, id=f"{name}-{short}")
        for short, dtype in DTYPES.items()
        for name in serving(op, dtype, interpreted)
    ]
    return pytest.mark.parametrize(("implementation", "dtype"), pairs)


every_implementation = pytest.mark.parametrize(
    ("op", "implementation"), [(op, name) for op in flags.OPS for name in serving(op, interpreted=True)]
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tables():
    """The tables of implementations, free to be changed by a test."""
    kept = {op: dict(table) for op, table in ops.IMPLEMENTATIONS.items()}
    yield ops.IMPLEMENTATIONS
    for op, table in kept.items():
        ops.IMPLEMENTATIONS[op].clear()
        ops.IMPLEMENTATIONS[op].update(table)


# --- Batches ---------------------------------------------------------------------------------------------------------


def sequences(*lengths, bound=None):
    """Sequences of these lengths that came packed."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return TokenBatch.from_cu_seqlens(cu_seqlens, bound or max(lengths, default=0), sum(lengths))


def masked(*rows, packed):
    """Rows of a padding mask such as "1101"; packed, their first columns are computed in any case."""
    mask = torch.tensor([[value == "1" for value in row] for row in rows])
    if not packed:
        return TokenBatch.padded(tuple(mask.shape), CPU, key_mask=mask)
    return TokenBatch.from_mask(mask, keep_first=True)


HOLES = ("111111111", "110100000", "000001111", "000000000", "010101011", "100000000")
BATCHES = {
    "short": sequences(1, 2, 15, 16, 17),
    "around 64": sequences(63, 64, 65),
    "around 128": sequences(127, 128, 129),
    "long": sequences(512, 257),
    "unequal": sequences(0, 130, 0, 0, 1, 33, 0, bound=200),
    "no tokens": sequences(0, 0),
    "no sequences": sequences(),
    "holes, packed": masked(*HOLES, packed=True),
    "holes, padded": masked(*HOLES, packed=False),
}


# --- Problems: an op's inputs, and how ours and the reference compute it ---------------------------------------------


TOKENS = BATCHES["holes, packed"].tokens  # of the problems that `problem_of` makes


@dataclass
class Problem:
    """The leaves by name, in the dtypes that the op gets; `ours` and `oracle` take them in order."""

    leaves: dict[str, Tensor]
    ours: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    dtype: torch.dtype  # of the result


def randn(*shape, dtype, scale=1.0, mean=0.0):
    return (torch.randn(*shape) * scale + mean).to(dtype)


def dropout_of(batch, p):
    return batch.dropout(p, SEED) if p else None


def attention_problem(batch, dtype, heads, head_dim, p):
    scale, dropout = head_dim**-0.5, dropout_of(batch, p)
    return Problem(
        leaves={name: randn(batch.tokens, heads * head_dim, dtype=dtype, scale=1.5) for name in "qkv"},
        ours=lambda *qkv: ops.attention(torch.cat(qkv, dim=1), batch, heads, scale, dropout),
        oracle=lambda *qkv: reference.attention(torch.cat(qkv, dim=1), batch.sequences, heads, scale, dropout),
        dtype=dtype,
    )


def bias_gelu_problem(batch, dtype, hidden, activation, p, bias=None):
    """`bias` is the bias's dtype."""
    x = randn(batch.tokens, hidden, dtype=dtype, scale=2.0)
    leaves = {"x": x} if bias is None else {"x": x, "bias": randn(hidden, dtype=bias)}
    dropout = dropout_of(batch, p)
    return Problem(
        leaves=leaves,
        ours=lambda x, bias=None: ops.bias_gelu(Product(x, bias), activation, dropout),
        oracle=lambda x, bias=None: reference.bias_gelu(
            x, None if bias is None else bias.to(x.dtype), activation, dropout
        ),
        dtype=dtype,
    )


def norm_leaves(hidden, dtype):
    return {"weight": randn(hidden, dtype=dtype, scale=0.2, mean=1.0), "norm_bias": randn(hidden, dtype=dtype)}


def add_norm_problem(batch, dtype, hidden, p, bias=None, residual=None, norm=None):
    """`dtype` is that of x; `bias`, `residual` and `norm` are the dtypes of the others, where they differ."""
    dropout = dropout_of(batch, p)
    biases = {} if bias is None else {"bias": randn(hidden, dtype=bias)}

    def ours(residual, x, weight, norm_bias, bias=None):
        return ops.add_norm(residual, Product(x, bias), Norm(weight, norm_bias, EPS), dropout)

    def oracle(residual, x, weight, norm_bias, bias=None):
        return reference.add_norm(residual, x, bias, Norm(weight, norm_bias, EPS), dropout)

    residual = randn(batch.tokens, hidden, dtype=residual or dtype, mean=0.5)
    x = randn(batch.tokens, hidden, dtype=dtype)
    leaves = {"residual": residual, "x": x, **norm_leaves(hidden, norm or dtype), **biases}
    return Problem(leaves, ours, oracle, torch.promote_types(residual.dtype, dtype))


def embeddings_problem(batch, dtype, hidden, p, words=50, norm=None):
    dropout = dropout_of(batch, p)
    ids, positions = torch.randint(0, words, (batch.tokens,)), batch.columns + 2
    positions[::5] = PADDING

    def ours(words, places, weight, norm_bias):
        return ops.embeddings(ids, positions, words, places, Norm(weight, norm_bias, EPS), PADDING, dropout)

    def oracle(words, places, weight, norm_bias):
        return reference.embeddings(ids, positions, words, places, Norm(weight, norm_bias, EPS), PADDING, dropout)

    tables = {
        "word_table": randn(words, hidden, dtype=dtype),
        "position_table": randn(batch.sequences.max_seqlen + 2, hidden, dtype=dtype),
    }
    return Problem({**tables, **norm_leaves(hidden, norm or dtype)}, ours, oracle, dtype)


def problem_of(op, dtype=torch.float32, batch=BATCHES["holes, packed"], p=0.3):
    """A small problem of each op, with all that it has: bias, dropout, key mask."""
    return {
        "attention": lambda: attention_problem(batch, dtype, heads=3, head_dim=32, p=p),
        "bias_gelu": lambda: bias_gelu_problem(batch, dtype, hidden=96, activation="gelu", p=p, bias=dtype),
        "add_norm": lambda: add_norm_problem(batch, dtype, hidden=96, p=p, bias=dtype),
        "embeddings": lambda: embeddings_problem(batch, dtype, hidden=96, p=p),
    }[op]()


# --- Rule 1 ----------------------------------------------------------------------------------------------------------

# Units in the last place of the tensor's size, on top of twice the error of the reference. The worst seen was 0.96,
# where the reference had been spared a rounding.
SLACK = 2


def solve(function, leaves, grad):
    """The result and the gradients of all leaves, by name."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out = function(*leaves.values())
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"result": out.detach(), **dict(zip(leaves, grads, strict=True))}


def largest(x):
    return x.double().abs().amax().item() if x.numel() else 0.0


def root_mean_square(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_rule_one(problem):
    """Error ≤ twice that of the reference in the same dtype + slack, of result and gradients, in two norms."""
    leaves, double = problem.leaves, {name: leaf.double() for name, leaf in problem.leaves.items()}
    exact_out = problem.oracle(*double.values())
    grad = torch.randn(exact_out.shape).to(problem.dtype)
    ours, same, exact = (
        solve(problem.ours, leaves, grad),
        solve(problem.oracle, leaves, grad),
        solve(problem.oracle, double, grad),
    )
    for name, truth in exact.items():
        expected_dtype = problem.dtype if name == "result" else leaves[name].dtype
        assert ours[name].dtype == expected_dtype, name
        assert ours[name].shape == truth.shape, name
        for norm in (largest, root_mean_square):
            error, bound = norm(ours[name] - truth), 2 * norm(same[name] - truth)
            bound += SLACK * torch.finfo(expected_dtype).eps * norm(truth)
            assert error <= bound, f"{name}: {norm.__name__} error {error:.2e}, bound {bound:.2e}"


@each_implementation("attention")
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "p"),
    [
        ("short", 3, 32, 0.0),
        ("short", 16, 64, 0.2),
        ("around 64", 6, 64, 0.0),
        ("around 64", 3, 32, 0.1),
        ("around 128", 3, 128, 0.0),
        ("around 128", 1, 64, 0.5),
        ("long", 1, 64, 0.0),
        ("long", 1, 32, 0.1),
        ("unequal", 12, 64, 0.0),
        ("unequal", 2, 128, 0.1),
        ("holes, packed", 12, 64, 0.0),
        ("holes, packed", 3, 32, 0.3),
        ("holes, padded", 8, 128, 0.0),
        ("holes, padded", 3, 32, 0.3),
        ("no tokens", 3, 32, 0.1),
    ],
)
def test_attention(implementation, dtype, batch, heads, head_dim, p):
    with use_kernels(attention=implementation):
        assert_rule_one(attention_problem(BATCHES[batch], dtype, heads, head_dim, p))


@each_implementation("bias_gelu")
@pytest.mark.parametrize(
    ("batch", "hidden", "activation", "p", "bias"),
    [
        ("short", 96, "gelu", 0.0, None),
        ("short", 384, "gelu", 0.1, "same"),
        ("around 64", 3072, "gelu", 0.0, "same"),
        ("unequal", 768, "gelu", 0.3, None),
        ("holes, packed", 1024, "gelu", 0.1, "float32"),
        ("holes, padded", 97, "gelu", 0.1, "same"),
        ("holes, packed", 96, "gelu_tanh", 0.1, "same"),
        ("short", 384, "gelu_tanh", 0.0, None),
        ("short", 384, "relu", 0.1, "same"),
        ("no tokens", 96, "gelu", 0.1, "same"),
        ("no tokens", 96, "gelu", 0.0, None),
    ],
)
def test_bias_gelu(implementation, dtype, batch, hidden, activation, p, bias):
    bias = {"same": dtype, "float32": torch.float32}.get(bias)
    with use_kernels(bias_gelu=implementation):
        assert_rule_one(bias_gelu_problem(BATCHES[batch], dtype, hidden, activation, p, bias))


@each_implementation("add_norm")
@pytest.mark.parametrize(
    ("batch", "hidden", "p", "bias"),
    [
        ("short", 96, 0.0, False),
        ("short", 384, 0.1, True),
        ("around 64", 768, 0.0, True),
        ("around 64", 768, 0.5, False),
        ("unequal", 1024, 0.1, True),
        ("holes, packed", 97, 0.3, True),
        ("holes, padded", 33, 0.3, True),
        ("no tokens", 96, 0.1, True),
        ("no tokens", 96, 0.0, False),
    ],
)
def test_add_norm(implementation, dtype, batch, hidden, p, bias):
    with use_kernels(layernorm=implementation):
        assert_rule_one(add_norm_problem(BATCHES[batch], dtype, hidden, p, dtype if bias else None))


@each_implementation("add_norm")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_add_norm_of_mixed_dtypes(implementation, dtype, p, bias):
    """As under autocast: the residual stream and the parameters in float32, a matrix product in the lower dtype."""
    with use_kernels(layernorm=implementation):
        assert_rule_one(
            add_norm_problem(BATCHES["around 64"], dtype, 768, p, bias, residual=torch.float32, norm=torch.float32)
        )


@each_implementation("add_norm")
@pytest.mark.parametrize("norm", [torch.float32, torch.bfloat16])
def test_add_norm_with_weights_of_another_dtype(implementation, dtype, norm):
    """The result's dtype follows residual and x alone."""
    with use_kernels(layernorm=implementation):
        assert_rule_one(add_norm_problem(BATCHES["short"], dtype, 384, 0.1, dtype, norm=norm))


@each_implementation("embeddings")
@pytest.mark.parametrize(
    ("batch", "hidden", "p"),
    [
        ("short", 96, 0.0),
        ("short", 384, 0.1),
        ("around 64", 768, 0.1),
        ("unequal", 1024, 0.0),
        ("holes, packed", 97, 0.3),
        ("holes, padded", 768, 0.3),
        ("no tokens", 96, 0.1),
    ],
)
def test_embeddings(implementation, dtype, batch, hidden, p):
    with use_kernels(embeddings=implementation):
        assert_rule_one(embeddings_problem(BATCHES[batch], dtype, hidden, p))


@pytest.mark.parametrize("implementation", serving("embeddings", interpreted=True))
def test_padding_rows_of_the_tables_get_no_gradient(implementation):
    ids, positions = torch.tensor([PADDING, 3, 3, PADDING, 4, 3, 5, 5]), torch.tensor([2, PADDING, 4, 5, 6, 2, 3, 4])
    word_table, position_table = (torch.randn(9, 96, requires_grad=True) for _ in range(2))
    norm = Norm(torch.rand(96), torch.randn(96), EPS)
    with use_kernels(embeddings=implementation):
        out = ops.embeddings(ids, positions, word_table, position_table, norm, PADDING)
    out.backward(torch.randn_like(out))
    touched = [{*rows.tolist()} - {PADDING} for rows in (ids, positions)]
    for table, rows in zip((word_table, position_table), touched, strict=True):
        assert set(table.grad.abs().sum(dim=1).nonzero().squeeze(1).tolist()) == rows


@each_implementation("embeddings")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sparse_gradient_of_the_word_table(implementation, dtype, p):
    """Its rows, added up, are the dense gradient; rows of padding are zero."""
    batch, words = BATCHES["short"], 7
    ids, positions = torch.randint(0, words, (51,)), batch.columns + 2
    tables = [randn(rows, 96, dtype=dtype).requires_grad_() for rows in (words, 19)]
    norm, grad = Norm(*norm_leaves(96, dtype).values(), EPS), randn(51, 96, dtype=dtype)
    with use_kernels(embeddings=implementation):
        sparse, dense = (
            torch.autograd.grad(
                ops.embeddings(ids, positions, *tables, norm, PADDING, dropout_of(batch, p), sparse),
                tables,
                grad,
            )
            for sparse in (True, False)
        )
    assert sparse[0].is_sparse
    assert sparse[0].dtype == dtype
    # The dense gradient is a sum of about 51 / 7 rows in the table's dtype.
    summed = sparse[0].double().to_dense()
    assert largest(summed - dense[0]) <= 8 * torch.finfo(dtype).eps * largest(summed)
    assert largest(summed[PADDING]) == 0.0
    assert torch.equal(sparse[1], dense[1])


# --- Sums over many tokens, and values at the edge of a dtype --------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("op", "implementation"),
    [(op, name) for op in ("bias_gelu", "add_norm", "embeddings") for name in serving(op)],
)
def test_gradients_summed_over_many_tokens(op, implementation, dtype):
    """4,096 tokens, where the order and the dtype of a sum show."""
    with use_implementations(**{op: implementation}):
        assert_rule_one(problem_of(op, dtype, TokenBatch.padded((16, 256), CPU), p=0.0))


@pytest.mark.parametrize("implementation", serving("add_norm", torch.float16, interpreted=True))
def test_add_norm_of_large_float16(implementation):
    """Squares of values beyond 256 overflow float16; statistics must be taken in float32."""
    x = torch.randn(17, 384).mul(500.0).half()
    norm = Norm(torch.ones(384).half(), torch.zeros(384).half(), EPS)
    with use_kernels(layernorm=implementation):
        out = ops.add_norm(x, Product(torch.zeros_like(x)), norm)
    exact = F.layer_norm(x.double(), (384,), eps=EPS)
    assert largest(out - exact) <= torch.finfo(torch.float16).eps * largest(exact)


@each_implementation("add_norm", interpreted=True)
@pytest.mark.parametrize("hidden", [97, 768])
@pytest.mark.parametrize("mean", [0.0, 1_000.0, 1e6])
def test_add_norm_of_equal_and_shifted_values(implementation, dtype, hidden, mean):
    """A mean that is off by a unit in its last place must not be seen over a standard deviation of 1, or of sqrt(eps).

    Equal values come out as zeros, as `F.layer_norm` has them.
    """
    x = (torch.randn(16, hidden) + min(mean, 6e4 if dtype == torch.float16 else mean)).to(dtype)
    x[3:8] = x[3:8, :1]
    x.requires_grad_()
    norm = Norm(torch.ones(hidden), torch.zeros(hidden), EPS)
    with use_kernels(layernorm=implementation):
        out = ops.add_norm(x, Product(torch.zeros(16, hidden)), norm)
    assert largest(out[3:8]) == 0.0
    doubled = x.detach().double().requires_grad_()
    exact = F.layer_norm(doubled, (hidden,), eps=EPS)
    assert largest(out - exact) <= 4 * 2.0**-23 * largest(exact)
    grad = torch.randn_like(out)
    (of_x,), (of_doubled,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(exact, doubled, grad.double())
    assert largest(of_x - of_doubled) <= 4 * torch.finfo(dtype).eps * largest(of_doubled)


@pytest.mark.parametrize("implementation", serving("bias_gelu", torch.float16, interpreted=True))
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_of_large_values(implementation, activation):
    x = torch.tensor([[-6e4, -1e3, -300.0, -30.0, 0.0, 30.0, 300.0, 1e3, 6e4]]).half().requires_grad_()
    with use_kernels(bias_gelu=implementation):
        out = ops.bias_gelu(Product(x), activation)
    (of_x,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x.relu())
    assert of_x[x != 0].tolist() == [0.0] * 4 + [1.0] * 4


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float16_scores_may_overflow_before_the_scale(implementation, dtype, p):
    """Products of 102,400 and, of every third key, 102,380; times the scale they fit into float16."""
    problem = attention_problem(sequences(5, 12), dtype, heads=1, head_dim=64, p=p)
    problem.leaves |= {name: torch.full_like(problem.leaves[name], 40.0) for name in "qk"}
    problem.leaves["k"][::3, :2] = 39.75
    grad = randn(17, 64, dtype=dtype)
    with use_kernels(attention=implementation):
        results = solve(problem.ours, problem.leaves, grad)
    exact = solve(problem.oracle, {name: leaf.double() for name, leaf in problem.leaves.items()}, grad)
    assert all(bool(each.isfinite().all()) for each in results.values())
    for name in ("result", "v"):  # of the others, nothing but rounding is left
        assert largest(results[name] - exact[name]) <= 2 * torch.finfo(dtype).eps * largest(exact[name])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_attention_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match=rf"scale must be positive, not {scale}; "):
        ops.attention(torch.zeros(3, 3 * 8), sequences(3), 1, scale)


@pytest.mark.parametrize("implementation", serving("attention"))
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_of_large_scores(implementation, p):
    """Scores of thousands, where a softmax without its maximum taken off would overflow."""
    problem = attention_problem(sequences(33, 5), torch.float32, heads=2, head_dim=32, p=p)
    problem.leaves = {name: leaf * (30.0 if name in "qk" else 1.0) for name, leaf in problem.leaves.items()}
    with use_kernels(attention=implementation):
        assert_rule_one(problem)


# --- Sequences without keys, nothing dropped, everything dropped -----------------------------------------------------


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sequences_without_keys_give_zeros(implementation, dtype, p):
    batch = sequences(4, 70, 0, 1, 5)
    empty = torch.zeros(80, dtype=torch.bool)
    empty[4:75] = True  # of the sequences of 70 and of 1
    batch = replace(batch, sequences=batch.sequences._replace(key_mask=~empty))
    qkv = randn(80, 3 * 64, dtype=dtype).requires_grad_()
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, batch, 2, 32**-0.5, dropout_of(batch, p))
    (of_qkv,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    for each in (out, of_qkv):
        assert torch.equal(each[empty], torch.zeros_like(each[empty]))
        assert bool(each.isfinite().all())
        assert bool((each[~empty] != 0).any())


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_sequences(implementation, dtype, p):
    qkv = torch.empty(0, 3 * 64, dtype=dtype, requires_grad=True)
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, sequences(), 2, 32**-0.5, dropout_of(sequences(), p))
    (of_qkv,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert (out.shape, out.dtype) == ((0, 64), dtype)
    assert (of_qkv.shape, of_qkv.dtype) == ((0, 192), dtype)


@each_implementation("attention", interpreted=True)
def test_one_token_attends_to_itself(implementation, dtype):
    qkv = randn(3, 3 * 64, dtype=dtype).requires_grad_()
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, sequences(1, 1, 1), 2, 32**-0.5)
    grad = torch.randn_like(out)
    (of_qkv,) = torch.autograd.grad(out, qkv, grad)
    expected = torch.cat([torch.zeros(3, 128, dtype=dtype), grad], dim=1)
    torch.testing.assert_close(out, qkv[:, 128:], rtol=0, atol=0)
    torch.testing.assert_close(of_qkv, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@every_implementation
def test_dropping_nothing_and_everything(op, implementation):
    with use_implementations(**{op: implementation}):
        problem = problem_of(op, p=0.0)
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        without = solve(problem.ours, problem.leaves, grad)
        torch.manual_seed(0)
        seeded = problem_of(op, p=1e-12)  # a seed, and a rate below 2^-32
        for name, value in solve(seeded.ours, problem.leaves, grad).items():
            torch.testing.assert_close(value, without[name], rtol=1e-5, atol=1e-5)
        everything = solve(problem_of(op, p=1.0).ours, problem.leaves, grad)
    assert all(bool(value.isfinite().all()) for value in everything.values())
    if op == "add_norm":
        assert largest(everything["x"]) == largest(everything["bias"]) == 0.0
        normal = F.layer_norm(problem.leaves["residual"], (96,), *list(problem.leaves.values())[2:4], EPS)
        torch.testing.assert_close(everything["result"], normal, rtol=0, atol=1e-5)
    else:
        assert {largest(value) for value in everything.values()} == {0.0}


# --- What must not change a result -----------------------------------------------------------------------------------


def views(x):
    """The same values, laid out in other ways."""
    yield x.t().contiguous().t()
    yield torch.stack([x, x + 1], dim=2)[..., 0]


@every_implementation
def test_layout_of_inputs_and_gradients(op, implementation):
    problem = problem_of(op)
    with use_implementations(**{op: implementation}):
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        expected = solve(problem.ours, problem.leaves, grad)
        flat = {name: leaf for name, leaf in problem.leaves.items() if leaf.dim() == 1}
        wide = {name: tuple(views(leaf)) for name, leaf in problem.leaves.items() if leaf.dim() == 2}
        for index, of_out in enumerate(views(grad)):
            strided = {name: each[index] for name, each in wide.items()}
            strided |= {name: leaf.repeat_interleave(2)[::2] for name, leaf in flat.items()}
            leaves = {name: strided[name] for name in problem.leaves}
            for name, value in solve(problem.ours, leaves, of_out).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=4e-6)


def test_attention_of_a_strided_qkv():
    """`cat` in the problems hides the layout of qkv itself."""
    batch, qkv = sequences(5, 9), torch.randn(14, 3 * 64)
    grad = torch.randn(14, 64)
    for implementation, p in itertools.product(serving("attention", interpreted=True), (0.0, 0.3)):

        def ours(qkv, p=p):
            return ops.attention(qkv, batch, 2, 0.2, dropout_of(batch, p))

        with use_kernels(attention=implementation):
            expected = solve(ours, {"qkv": qkv}, grad)
            for view in views(qkv):
                for name, value in solve(ours, {"qkv": view}, grad).items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@every_implementation
def test_inputs_that_are_negated_views(op, implementation):
    """Their memory holds the values with the other sign."""
    problem = problem_of(op)
    negated = {name: torch._neg_view(-leaf) for name, leaf in problem.leaves.items()}
    grad = torch.randn(TOKENS, 96)
    with use_implementations(**{op: implementation}):
        expected, found = (solve(problem.ours, leaves, grad) for leaves in (problem.leaves, negated))
        inferred = problem.ours(*negated.values())
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert torch.equal(inferred, expected["result"])


@pytest.mark.parametrize("op", ["add_norm", "embeddings"])
def test_a_layer_norm_without_a_bias(op):
    problem = problem_of(op)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if name != "norm_bias"}
    grad, names = torch.randn(TOKENS, 96), list(problem.leaves)

    def ours(*values, norm_bias=None):
        found = dict(zip(leaves, values, strict=True))
        return problem.ours(*(found.get(name, norm_bias) for name in names))

    zeros = torch.zeros(96)
    for implementation in serving(op, interpreted=True):
        with use_implementations(**{op: implementation}):
            found, expected = (solve(partial(ours, norm_bias=bias), leaves, grad) for bias in (None, zeros))
            inferred = ours(*leaves.values())
        assert all(torch.equal(found[name], each) for name, each in expected.items())
        assert torch.equal(inferred, expected["result"])


@pytest.mark.parametrize("implementation", serving("attention", interpreted=True))
def test_heads_that_do_not_divide_what_there_is(implementation):
    batch, qkv = BATCHES["short"], torch.randn(BATCHES["short"].tokens, 3 * 64)
    with use_kernels(attention=implementation), pytest.raises(ValueError, match="qkv has 192 features, which 5 heads"):
        ops.attention(qkv, batch, 5, 0.1)


@every_implementation
def test_a_gradient_of_one_value(op, implementation):
    """`sum().backward()` gives a gradient with strides of zero."""
    problem = problem_of(op)
    with use_implementations(**{op: implementation}):
        out = problem.ours(*problem.leaves.values())
        expected = solve(problem.ours, problem.leaves, torch.ones_like(out))
        for name, value in solve(problem.ours, problem.leaves, out.new_ones(1, 1).expand_as(out)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@every_implementation
def test_bits_are_the_same_again(op, implementation):
    problem = problem_of(op, batch=BATCHES["short"])
    with use_implementations(**{op: implementation}):
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        first, second = (solve(problem.ours, problem.leaves, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_implementation
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_packed_and_padded_agree_at_real_tokens(op, implementation, p):
    """Forward, where the two layouts differ in all but the tokens' coordinates."""
    mask = torch.tensor([[value == "1" for value in row] for row in HOLES])
    packed, padded = BATCHES["holes, packed"], BATCHES["holes, padded"]
    outputs = []
    with use_implementations(**{op: implementation}):
        if op == "embeddings":
            ids, tables = torch.randint(0, 50, mask.shape), [torch.randn(50, 96), torch.randn(12, 96)]
            norm = Norm(torch.rand(96), torch.randn(96), EPS)
            for batch in (packed, padded):
                rows = (batch.pack(ids), batch.columns + 2)
                out = ops.embeddings(*rows, *tables, norm, PADDING, dropout_of(batch, p))
                outputs.append(batch.unpack(out)[mask])
        else:
            leaves = problem_of(op, batch=padded).leaves
            for batch in (packed, padded):
                inputs = [
                    batch.pack(leaf.unflatten(0, mask.shape)) if leaf.dim() == 2 else leaf for leaf in leaves.values()
                ]
                outputs.append(batch.unpack(problem_of(op, batch=batch, p=p).ours(*inputs))[mask])
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", serving("attention", interpreted=True))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_loose_bound_of_lengths(implementation, p):
    qkv, batches = torch.randn(12, 3 * 64), [sequences(3, 0, 9, bound=bound) for bound in (9, 512)]
    with use_kernels(attention=implementation):
        tight, loose = (ops.attention(qkv, batch, 2, 0.2, dropout_of(batch, p)) for batch in batches)
    torch.testing.assert_close(loose, tight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("op", "implementation"), [(op, name) for op in flags.OPS for name in serving(op)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_leaves_ops_alone(op, implementation, dtype, p):
    """The dtype of a result is a function of the inputs', and the arithmetic inside is ours to choose."""
    problem = problem_of(op, dtype, p=p)
    with use_implementations(**{op: implementation}):
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        outside = solve(problem.ours, problem.leaves, grad)
        with torch.autocast("cpu", torch.bfloat16):
            inside = solve(problem.ours, problem.leaves, grad)
    for name, value in outside.items():
        assert inside[name].dtype == value.dtype, name
        assert torch.equal(inside[name], value), name


# --- Autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", flags.OPS)
def test_each_leaf_alone_gets_its_gradient(op):
    problem = problem_of(op)
    grad = torch.randn_like(problem.ours(*problem.leaves.values()))
    expected = solve(problem.ours, problem.leaves, grad)
    for name in problem.leaves:
        leaves = {each: leaf.clone().requires_grad_(each == name) for each, leaf in problem.leaves.items()}
        problem.ours(*leaves.values()).backward(grad)
        assert torch.equal(leaves[name].grad, expected[name]), name
        assert all(leaf.grad is None for each, leaf in leaves.items() if each != name)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_residual_and_x_do_not_share_memory(p):
    """Without dropout they are equal; an optimizer or a clipping that writes to one must not change the other."""
    residual, x = (torch.randn(8, 96, requires_grad=True) for _ in range(2))
    norm = Norm(torch.ones(96), torch.zeros(96), EPS)
    out = ops.add_norm(residual, Product(x), norm, dropout_of(sequences(8), p))
    out.backward(torch.randn_like(out))
    before = x.grad.clone()
    residual.grad.zero_()
    assert torch.equal(x.grad, before)


def test_residual_and_x_may_be_one_tensor():
    x = torch.randn(8, 96, dtype=torch.float64, requires_grad=True)
    weight, norm_bias = torch.rand(96).double(), torch.randn(96).double()
    ours = ops.add_norm(x, Product(x), Norm(weight, norm_bias, EPS))
    grad = torch.randn_like(ours)
    expected = F.layer_norm(2 * x, (96,), weight, norm_bias, EPS)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("op", flags.OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(op, mode):
    problem = problem_of(op)
    expected = problem.ours(*(leaf.requires_grad_() for leaf in problem.leaves.values()))
    with mode():
        out = problem.ours(*problem.leaves.values())
    assert not out.requires_grad
    assert torch.equal(out, expected)


def test_float64_to_the_last_digits():
    for op in flags.OPS:
        problem = problem_of(op, torch.float64)
        grad = torch.randn(problem.oracle(*problem.leaves.values()).shape, dtype=torch.float64)
        exact = solve(problem.oracle, problem.leaves, grad)
        for name, value in solve(problem.ours, problem.leaves, grad).items():
            torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-12)


# --- The reference itself --------------------------------------------------------------------------------------------


def test_reference_layer_norm():
    x, weight, norm_bias = torch.randn(9, 97).double(), torch.rand(97).double(), torch.randn(97).double()
    expected = F.layer_norm(x, (97,), weight, norm_bias, EPS)
    torch.testing.assert_close(reference.layer_norm(x, Norm(weight, norm_bias, EPS)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_reference_activations(activation):
    x = torch.linspace(-9, 9, 4_001, dtype=torch.float64, requires_grad=True)
    expected = {
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "relu": lambda: torch.relu(x),
    }[activation]()
    torch.testing.assert_close(reference.activate(x, activation), expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(x)
    (of_x,) = torch.autograd.grad(expected, x, grad)
    computed = reference.activate_backward(grad, x.detach(), activation)
    torch.testing.assert_close(computed, of_x, rtol=0, atol=1e-12)


@pytest.mark.skipif("native" not in serving("attention"), reason="the native library cannot be built here")
@pytest.mark.parametrize("bounds", [[0, 4, 9], [0, 4, 7], [1, 4, 8], [0, 9, 8], [0, 8]], ids=str)
def test_native_attention_refuses_bounds_beyond_the_tokens(bounds):
    """As a compiled or traced model may pass them: it would write into memory that is not its own."""
    batch = sequences(4, 4)
    bounds = batch.sequences._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    batch = replace(batch, sequences=bounds)
    with use_kernels(attention="native"), pytest.raises((RuntimeError, ValueError), match="cu_seqlens"):
        ops.attention(torch.randn(8, 3 * 32), batch, heads=2, scale=1.0)


def naive_attention(qkv, batch, heads, scale, p):
    """One query at a time, by the definition."""
    sequence_ids, key_mask = batch.sequences.sequence_ids, batch.sequences.key_mask
    query, key, value = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    out = torch.zeros_like(query)
    for i, h in itertools.product(range(batch.tokens), range(heads)):
        sequence, column = sequence_ids[i], batch.columns[i]
        keys = (sequence_ids == sequence).nonzero().squeeze(1)
        if key_mask is not None:
            keys = keys[key_mask[keys]]
        weights = torch.exp(key[keys, h] @ query[i, h] * scale)
        weights = weights / weights.sum()
        if p and len(keys):
            mask = dropout_mask(SEED, p, 512, column, sequence, h)[batch.columns[keys]]
            weights = weights * mask / (1 - p)
        out[i, h] = weights @ value[keys, h]
    return out.flatten(1)


@pytest.mark.parametrize("batch", ["short", "holes, packed", "holes, padded", "no tokens"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attention(batch, p):
    batch = BATCHES[batch]
    qkv = torch.randn(batch.tokens, 3 * 2 * 5, dtype=torch.float64)
    ours = reference.attention(qkv, batch.sequences, 2, 0.4, dropout_of(batch, p))
    torch.testing.assert_close(ours, naive_attention(qkv, batch, 2, 0.4, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", ["short", "holes, packed", "holes, padded", "unequal", "no tokens"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attention_backward(batch, p):
    batch = BATCHES[batch]
    where = (batch.sequences, 2, 0.4, dropout_of(batch, p))
    qkv = torch.randn(batch.tokens, 3 * 2 * 8, dtype=torch.float64, requires_grad=True)
    out = reference.attention(qkv, *where)
    grad = torch.randn_like(out)
    (of_qkv,) = torch.autograd.grad(out, qkv, grad)
    assert bool(of_qkv.isfinite().all())
    torch.testing.assert_close(reference.attention_backward(grad, qkv.detach(), *where), of_qkv, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked_keys", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_attend_backward(masked_keys, p):
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    key_mask = None
    if masked_keys:
        key_mask = torch.rand(2, 1, 1, 7) < 0.6
        key_mask[1] = False
    masks = (key_mask, torch.rand(2, 3, 7, 7) >= p if p else None, p)
    out, probabilities = reference.attend(query, key, value, 0.3, *masks)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (query, key, value), grad)
    computed = reference.attend_backward(grad, query.detach(), key.detach(), value.detach(), 0.3, *masks)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(out, probabilities @ value, rtol=0, atol=1e-12)


def test_reference_layer_norm_backward():
    leaves = [torch.randn(9, 97).double(), torch.rand(97).double(), torch.randn(97).double()]
    x, weight, norm_bias = (leaf.requires_grad_() for leaf in leaves)
    out = reference.layer_norm(x, Norm(weight, norm_bias, EPS))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    computed = reference.layer_norm_backward(grad, x.detach(), weight.detach(), EPS)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_reference_add_norm_and_embeddings():
    batch, hidden = BATCHES["holes, packed"], 96
    dropout = dropout_of(batch, 0.3)
    mask = dropout_mask(SEED, 0.3, hidden, dropout.columns, dropout.sequence_ids).double() / 0.7
    problem = add_norm_problem(batch, torch.float64, hidden, 0.3, bias=torch.float64)
    residual, x, weight, norm_bias, bias = problem.leaves.values()
    expected = F.layer_norm(residual + mask * (x + bias), (hidden,), weight, norm_bias, EPS)
    torch.testing.assert_close(problem.oracle(*problem.leaves.values()), expected, rtol=0, atol=1e-12)
    ids, tables = torch.randint(0, 12, (2, batch.tokens)), torch.randn(2, 12, hidden).double()
    ours = reference.embeddings(*ids, *tables, Norm(weight, norm_bias, EPS), PADDING, dropout)
    expected = mask * F.layer_norm(tables[0][ids[0]] + tables[1][ids[1]], (hidden,), weight, norm_bias, EPS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_softmax_of_nothing_is_zero(dtype):
    scores = torch.tensor([[-torch.inf] * 3, [0.0, -torch.inf, 0.0]], dtype=dtype, requires_grad=True)
    probabilities = reference.softmax(scores)
    assert probabilities.tolist() == [[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    probabilities.backward(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], dtype=dtype))
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0], [-0.5, 0.0, 0.5]]


# --- attention_with_probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["short", "unequal", "holes, packed", "holes, padded", "no tokens"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_with_probabilities(batch, p):
    batch, heads = BATCHES[batch], 2
    cu_seqlens, max_seqlen = batch.sequences.cu_seqlens, batch.sequences.max_seqlen
    problem = attention_problem(batch, torch.float64, heads, 8, p)
    leaves = problem.leaves

    def ours(*qkv):
        return ops.attention_with_probabilities(
            torch.cat(qkv, dim=1), batch, heads, 8**-0.5, None, dropout_of(batch, p)
        )

    out, probabilities = ours(*leaves.values())
    grad = torch.randn_like(out)
    exact = solve(problem.oracle, leaves, grad)
    for name, value in solve(lambda *qkv: ours(*qkv)[0], leaves, grad).items():
        torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-12)
    assert probabilities.shape == (len(cu_seqlens) - 1, heads, max_seqlen, max_seqlen)
    for sequence, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        values = leaves["v"][start:end].unflatten(1, (heads, 8)).transpose(0, 1)
        weighted = probabilities[sequence, :, : end - start, : end - start] @ values
        torch.testing.assert_close(weighted.transpose(0, 1).flatten(1), out[start:end], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_scores_bias(dtype, bias_dtype):
    """A bias of the scores, in the dtype of qkv or in float32 as a model's mask makes it."""
    rows, columns, heads, head_dim = 2, 6, 2, 16
    batch = TokenBatch.padded((rows, columns), CPU)
    qkv = randn(rows * columns, 3 * heads * head_dim, dtype=dtype).requires_grad_()
    bias = torch.randn(rows, heads, columns, columns).to(dtype)
    bias[0, :, :, 4:] = -torch.inf
    bias[1, 0, 2] = -torch.inf  # a query without keys
    out, probabilities = ops.attention_with_probabilities(qkv, batch, heads, 0.25, bias.to(bias_dtype or dtype))
    assert out.dtype == probabilities.dtype == dtype
    query, key, value = qkv.double().view(rows, columns, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(query @ key.transpose(-1, -2) * 0.25 + bias.double(), dim=-1).nan_to_num(0.0)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(probabilities.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        out.double(), (expected @ value).transpose(1, 2).reshape(rows * columns, -1), rtol=0, atol=4 * tolerance
    )
    assert bool(torch.autograd.grad(out.sum(), qkv)[0].isfinite().all())


# --- Custom ops ------------------------------------------------------------------------------------------------------


def strided(x, layout, requires_grad=True):
    """The values of x in a layout of its own."""
    x = x.t().contiguous().t() if layout == "transposed" else x
    return x.detach().requires_grad_(requires_grad)


def custom_op_calls(implementation, dtype, p, layout, batch=BATCHES["holes, packed"]):
    """The arguments of all eight custom ops, by name."""
    tokens, hidden = batch.tokens, 96
    dropout = dropout_of(batch, p) or [None] * 4

    def wide(columns=hidden, requires_grad=True):
        return strided(randn(tokens, columns, dtype=dtype), layout, requires_grad)

    def table(rows):
        return strided(randn(rows, hidden, dtype=dtype), layout)

    def row(requires_grad=True):
        return torch.rand(hidden).requires_grad_(requires_grad)

    def norm(requires_grad=True):
        return row(requires_grad), row(requires_grad), EPS

    attended, unmasked = (
        (*batch.sequences._replace(key_mask=key_mask), 3, 0.2, *dropout)
        for key_mask in (batch.sequences.key_mask, None)
    )
    rows = (torch.randint(0, 9, (tokens,)), torch.randint(0, 12, (tokens,)))
    grad, nothing_saved, saving = wide(requires_grad=False), torch.empty(0), (True, implementation)
    into_attention = (grad, grad, nothing_saved, wide(3 * hidden, False))
    into_gelu, last = (grad, wide(hidden, False)), (implementation,)
    into_embeddings = (grad, wide(hidden, False), *rows)
    return {
        "attention": (wide(3 * hidden), *attended, *saving),
        "attention, no key mask": (wide(3 * hidden), *unmasked, *saving),
        "attention_backward": (*into_attention, *attended, *last),
        "attention_backward, no key mask": (*into_attention, *unmasked, *last),
        "bias_gelu": (wide(), row(), "gelu", *dropout, *saving),
        "bias_gelu, no bias": (wide(), None, "gelu", *dropout, *saving),
        "bias_gelu_backward": (*into_gelu, row(False), "gelu", *dropout, *last),
        "bias_gelu_backward, no bias": (*into_gelu, None, "gelu", *dropout, *last),
        "add_norm": (wide(), wide(), row(), *norm(), *dropout, *saving),
        "add_norm, no bias": (wide(), wide(), None, *norm(), *dropout, *saving),
        "add_norm, nothing saved": (
            *(wide(hidden, False), wide(hidden, False), row(False), *norm(False), *dropout),
            *(False, implementation),
        ),
        "add_norm_backward": (grad, wide(hidden, False), *norm(False), *dropout, *last),
        "embeddings": (*rows, table(9), table(12), *norm(), PADDING, *dropout, False, *saving),
        "embeddings_backward": (*into_embeddings, [9, 96], [12, 96], *norm(False), PADDING, *dropout, False, *last),
        "embeddings_backward, sparse": (
            *(*into_embeddings, [9, 96], [12, 96], *norm(False), PADDING, *dropout, True, *last),
        ),
        "embeddings_backward, frozen words": (
            *(*into_embeddings, None, [12, 96], *norm(False), PADDING, *dropout, False, *last),
        ),
    }


CALLS = list(custom_op_calls("torch", torch.float32, 0.0, "contiguous"))


def opchecked(layout, dtype, rates):
    """`(call, implementation, dtype, p, layout)` of what `opcheck` is to be run on."""
    for call, p in itertools.product(CALLS, rates):
        op = call.split(",")[0].removesuffix("_backward")
        for implementation in serving(op, dtype):
            label = f"{call}-{implementation}-{layout}-{p}"
            yield pytest.param(call, implementation, dtype, p, layout, id=label)


@pytest.mark.parametrize(
    ("call", "implementation", "dtype", "p", "layout"),
    [
        *opchecked("contiguous", torch.float32, (0.0, 0.3)),
        *opchecked("transposed", torch.bfloat16, (0.3,)),
    ],
)
def test_opcheck(call, implementation, dtype, p, layout):
    op = getattr(torch.ops.erniem_fast, call.split(",")[0]).default
    torch.library.opcheck(op, custom_op_calls(implementation, dtype, p, layout)[call])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_ops_compile_in_one_graph(p):
    """Forward and backward of all four, in a graph without breaks."""
    torch.compiler.reset()
    for op in flags.OPS:
        problem = problem_of(op, p=p)
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        expected = solve(problem.ours, problem.leaves, grad)
        compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
        for name, value in solve(compiled, problem.leaves, grad).items():
            assert torch.equal(value, expected[name]), (op, name)


# --- The choice of an implementation ---------------------------------------------------------------------------------


def noting(calls, name, like, **fields):
    """An implementation that notes where it runs."""

    def direction(which):
        def run(**values):
            calls.append((name, which))
            function = getattr(like, which)
            return function(**arguments_of(function, values))

        return run

    return replace(like, forward=direction("forward"), backward=direction("backward"), **fields)


@pytest.fixture
def calls(tables, monkeypatch):
    """Notes what runs, with a kernel in front of every table that takes float32 on a CPU alone."""
    for flag in (flags.KERNELS, flags.VERIFY, *flags.OPS.values()):
        monkeypatch.delenv(flag.name, raising=False)
    calls = []

    def refuses(device, dtype):
        return None if (device, dtype) == (CPU, torch.float32) else "it takes float32 on a CPU; use float32"

    for table in tables.values():
        former = {name: table[name] for name in ("torch", "reference")}
        table.clear()
        table["kernel"] = noting(calls, "kernel", former["torch"], refuses=refuses, fuses_bias=True)
        table.update({name: noting(calls, name, each) for name, each in former.items()})
    return calls


def run_once(op, dtype=torch.float32):
    problem = problem_of(op, dtype)
    problem.ours(*problem.leaves.values())


@pytest.mark.parametrize("op", flags.OPS)
def test_auto_takes_the_first_that_can_serve(op, calls):
    run_once(op)
    run_once(op, torch.bfloat16)
    assert calls == [("kernel", "forward"), ("torch", "forward")]


@pytest.mark.parametrize("op", flags.OPS)
def test_kernels_off(op, calls, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    run_once(op)
    with use_implementations(**{op: "reference"}):
        run_once(op)
    assert calls == [("torch", "forward"), ("reference", "forward")]


@pytest.mark.parametrize("op", flags.OPS)
def test_flags_are_read_at_every_call(op, calls, monkeypatch):
    for value in ("reference", "torch", "auto"):
        monkeypatch.setenv(flags.OPS[op].name, value)
        run_once(op)
    with use_implementations(**{op: "reference"}):
        run_once(op)
    assert [name for name, _ in calls] == ["reference", "torch", "kernel", "reference"]


@pytest.mark.parametrize("op", flags.OPS)
def test_a_flag_is_the_op_s_own(op, calls):
    with use_implementations(**{op: "reference"}):
        for other in flags.OPS:
            run_once(other)
    assert calls == [("reference" if other == op else "kernel", "forward") for other in flags.OPS]


@pytest.mark.parametrize("op", flags.OPS)
def test_the_backward_runs_what_the_forward_ran(op, calls):
    problem = problem_of(op)
    with use_implementations(**{op: "reference"}):
        out = problem.ours(*(leaf.requires_grad_() for leaf in problem.leaves.values()))
    out.sum().backward()
    assert calls == [("reference", "forward"), ("reference", "backward")]


@pytest.mark.parametrize("op", flags.OPS)
def test_what_cannot_be_served_says_why(op, tables):
    def refuses(device, dtype):
        return f"no {dtype} on {device}; use another"

    tables[op]["reference"] = replace(tables[op]["reference"], refuses=refuses)
    with (
        use_implementations(**{op: "reference"}),
        pytest.raises(RuntimeError, match=r"no torch\.float32 on cpu") as raised,
    ):
        run_once(op)
    assert f"{flags.OPS[op].name}=reference" in str(raised.value)


def test_fuses_bias_follows_the_choice(calls):
    for op in flags.OPS:
        assert ops.fuses_bias(op, torch.zeros(1))
        assert not ops.fuses_bias(op, torch.zeros(1, dtype=torch.bfloat16))
        with use_implementations(**{op: "torch"}):
            assert not ops.fuses_bias(op, torch.zeros(1))


# --- ERNIEM_FAST_VERIFY ----------------------------------------------------------------------------------------------


@pytest.fixture
def verify(monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")


@pytest.mark.parametrize("op", flags.OPS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_verify_accepts_right_results(op, dtype, p, verify):
    for batch in ("short", "unequal", "holes, packed", "holes, padded", "no tokens"):
        problem = problem_of(op, dtype, BATCHES[batch], p)
        grad = torch.randn_like(problem.ours(*problem.leaves.values()))
        solve(problem.ours, problem.leaves, grad)


def test_verify_accepts_mixed_dtypes(verify):
    for dtype, p in itertools.product(DTYPES.values(), (0.0, 0.3)):
        problem = add_norm_problem(
            BATCHES["short"], dtype, 384, p, torch.float32, residual=torch.float32, norm=torch.float32
        )
        solve(problem.ours, problem.leaves, torch.randn(51, 384))
        problem = bias_gelu_problem(BATCHES["short"], dtype, 384, "gelu", p, bias=torch.float32)
        solve(problem.ours, problem.leaves, torch.randn(51, 384))


def narrow_problem_of(op, dtype, size, p, batch=BATCHES["holes, packed"]):
    """A problem of each op with `size` features, or elements of a head."""
    return {
        "attention": lambda: attention_problem(batch, dtype, heads=1, head_dim=size, p=p),
        "bias_gelu": lambda: bias_gelu_problem(batch, dtype, size, "gelu", p, bias=dtype),
        "add_norm": lambda: add_norm_problem(batch, dtype, size, p, bias=dtype),
        "embeddings": lambda: embeddings_problem(batch, dtype, size, p),
    }[op]()


@every_implementation
def test_verify_accepts_right_results_of_few_numbers(op, implementation, verify):
    """Sizes of a few features, and dropout that leaves next to nothing: the reference's error may be 0 by luck."""
    for size, dtype, p in itertools.product(range(1, 13), DTYPES.values(), (0.0, 0.999)):
        if implementation not in serving(op, dtype, interpreted=True):
            continue
        problem = narrow_problem_of(op, dtype, size, p)
        with use_implementations(**{op: implementation}):
            solve(problem.ours, problem.leaves, torch.randn(TOKENS, size))


@pytest.mark.parametrize("implementation", serving("add_norm", interpreted=True))
def test_verify_accepts_rows_that_are_nearly_constant(implementation, verify):
    for dtype, eps, hidden in itertools.product(DTYPES.values(), (1e-5, 1e-12), (3, 12, 96)):
        if implementation not in serving("add_norm", dtype, interpreted=True):
            continue
        units = torch.randint(-2, 3, (17, hidden)) * torch.finfo(dtype).eps
        residual = (randn(17, 1, dtype=dtype, scale=1000.0) * (1.0 + units)).to(dtype)
        leaves = {"residual": residual, "x": torch.zeros_like(residual), **norm_leaves(hidden, dtype)}
        with use_kernels(layernorm=implementation):
            solve(
                lambda residual, x, *norm, eps=eps: ops.add_norm(residual, Product(x), Norm(*norm, eps)),
                leaves,
                torch.randn(17, hidden),
            )


@pytest.mark.parametrize("op", ["bias_gelu", "add_norm", "embeddings"])
def test_verify_accepts_a_batch_of_training(op, verify):
    problem = problem_of(op, batch=TokenBatch.padded((16, 512), CPU), p=0.1)
    solve(problem.ours, problem.leaves, torch.randn(16 * 512, 96))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_verify_accepts_large_float16(activation, verify):
    x = torch.tensor([[-1e3, -300.0, 0.5, 300.0, 1e3]]).half()
    solve(lambda x: ops.bias_gelu(Product(x), activation), {"x": x}, torch.ones(1, 5))


def off_by_a_little(result):
    changed = result.clone()
    changed.view(-1)[-1] += 2e-5 * result.abs().amax()  # in float32; twenty times the slack
    return changed


def with_a_nan(result):
    changed = result.clone()
    changed.view(-1)[0] = torch.nan
    return changed


WRONG = {
    "value": off_by_a_little,
    "NaN": with_a_nan,
    "infinity": lambda result: torch.full_like(result, torch.inf),
    "zeros": torch.zeros_like,
    "shape": lambda result: torch.cat([result, result]),
    "shape that broadcasts": lambda result: result.unsqueeze(0),
    "dtype": lambda result: result.double(),
}


def broken(right, direction, index, wrong):
    """An implementation whose result number `index` is wrong in one direction."""

    def run(**values):
        function = getattr(right, direction)
        results = function(**arguments_of(function, values))
        if isinstance(results, Tensor):
            return wrong(results)
        return tuple(wrong(each) if place == index else each for place, each in enumerate(results))

    return replace(right, **{direction: run})


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", flags.OPS)
def test_verify_refuses_wrong_results(op, direction, wrong, tables, verify):
    tables[op]["torch"] = broken(tables[op]["torch"], direction, 0, wrong)
    problem = problem_of(op)
    with use_implementations(**{op: "torch"}), pytest.raises(RuntimeError, match=f"^{op} {direction}") as raised:
        solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))
    for part in ("(torch)", "result 0", "torch.float"):
        assert part in str(raised.value)


@pytest.mark.parametrize(("op", "results"), [("embeddings", 4), ("bias_gelu", 2), ("add_norm", 5)])
def test_verify_looks_at_every_gradient(op, results, tables, verify):
    right = tables[op]["torch"]
    problem = problem_of(op)
    for index in range(results):
        tables[op]["torch"] = broken(right, "backward", index, off_by_a_little)
        with use_implementations(**{op: "torch"}), pytest.raises(RuntimeError, match=f"backward .* result {index} "):
            solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))


def test_verify_message_states_error_and_bound(tables, verify):
    tables["bias_gelu"]["torch"] = broken(tables["bias_gelu"]["torch"], "forward", 0, lambda result: result + 0.5)
    with pytest.raises(RuntimeError) as raised, use_kernels(bias_gelu="torch"):
        ops.bias_gelu(Product(torch.ones(3, 8)), "relu")
    message = str(raised.value)
    for part in ("bias_gelu forward (torch)", "(3, 8)", "torch.float32", "5.000e-01"):
        assert part in message
    # Nothing is rounded in relu(1): what is left is eight units in the last place of 1.
    assert f"{8 * torch.finfo(torch.float32).eps:.3e}" in message


def test_verify_is_off_by_default_and_costs_nothing(calls):
    for op in flags.OPS:
        problem = problem_of(op)
        solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))
    assert {name for name, _ in calls} == {"kernel"}


def test_verify_runs_the_reference_in_both_directions(calls, verify):
    for op in flags.OPS:
        calls.clear()
        problem = problem_of(op)
        solve(problem.ours, problem.leaves, torch.randn(TOKENS, 96))
        for direction in ("forward", "backward"):
            kernel, *references = (name for name, which in calls if which == direction)
            assert kernel == "kernel"
            assert {*references} == {"reference"}
            assert len(references) % 2 == 0  # in the dtype and in float64


# --- A result in its input's memory ----------------------------------------------------------------------------------


def gelu_of(product, dropout):
    return ops.bias_gelu(product, "gelu", dropout)


def norm_of(product, dropout):
    residual = torch.linspace(-1, 1, product.x.numel()).view_as(product.x)
    return ops.add_norm(residual, product, Norm(torch.ones(97), torch.zeros(97), 1e-5), dropout)


@pytest.mark.parametrize("op", [gelu_of, norm_of])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_overwrite(op, bias, p, monkeypatch):
    """The same bits; in the input's memory where an implementation can and nothing else needs the input."""
    dropout = dropout_of(BATCHES["holes, packed"], p)
    leaf, bias = randn(TOKENS, 97, dtype=torch.float32), randn(97, dtype=torch.float32) if bias else None
    expected = op(Product(leaf, bias), dropout)
    assert torch.equal(op(Product(leaf.clone(), bias, reusable=True), dropout), expected)

    def overwritten(x):
        before = x.detach().clone()
        assert torch.equal(op(Product(x, bias, reusable=True), dropout).detach(), expected)
        return not torch.equal(x.detach(), before)

    assert not overwritten(leaf.clone().requires_grad_())
    with use_kernels(bias_gelu="native", layernorm="native"):
        assert overwritten(leaf.clone())
        monkeypatch.setenv(flags.VERIFY.name, "1")
        assert not overwritten(leaf.clone())


def test_a_norm_overwrites_nothing_of_a_narrower_dtype():
    x, residual = torch.randn(TOKENS, 97, dtype=torch.bfloat16), torch.randn(TOKENS, 97)
    before, norm = x.clone(), Norm(torch.ones(97), torch.zeros(97), 1e-5)
    with use_kernels(layernorm="native"):
        out = ops.add_norm(residual, Product(x, reusable=True), norm)
    assert out.dtype == torch.float32
    assert torch.equal(x, before)


def test_no_gradient_is_made_of_what_is_only_saved():
    """Zeros as large as what the layer norm saves would take a sixth of its backward's time."""
    batch = TokenBatch.from_cu_seqlens(torch.tensor([0, 5, 12]), 7, 12)
    problem = add_norm_problem(batch, torch.float32, 96, p=0.3)
    leaves = [leaf.requires_grad_() for leaf in problem.leaves.values()]
    out = problem.ours(*leaves)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(out, leaves, out.detach())
    assert "aten::zeros" not in {event.name for event in profile.events()}
