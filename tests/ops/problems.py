"""Problems that tests of the ops share: inputs, and how an op and the reference compute them.

Triton's interpreter is slow and has tests of its own; here it joins where inputs are small.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from erniem_fast import flags, ops, reference
from erniem_fast.batch import TokenBatch, key_bias_of
from erniem_fast.dropout import dropout_mask
from erniem_fast.ops import Product
from erniem_fast.reference import Norm
from tests.batches import SEED, dropout_of, ranged, sequences

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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


def masked(*rows, packed):
    """Rows of a padding mask such as "1101"; packed, their first columns are computed in any case."""
    mask = torch.tensor([[value == "1" for value in row] for row in rows])
    if not packed:
        return TokenBatch.padded(tuple(mask.shape), CPU, key_bias_of(mask))
    return TokenBatch.from_mask(mask, keep_first=True)


def biased(*lengths):
    """Sequences whose keys count for more or less than one, for many, or for nothing; the first has no keys."""
    batch = sequences(*lengths)
    key_bias = torch.randn(batch.tokens, generator=torch.Generator().manual_seed(0))
    key_bias[::3] = -torch.inf
    key_bias[::4] = math.log(400)
    key_bias[: lengths[0]] = -torch.inf
    return replace(batch, sequences=batch.sequences._replace(key_bias=key_bias))


def biased_and_ranged(*lengths):
    return biased(*lengths).attending_to(ranged(*lengths).sequences.key_ranges)


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
    "biases": biased(3, 40, 1, 0, 33),
    "ranges": ranged(70, 1, 0, 33, 130),
    "biases and ranges": biased_and_ranged(3, 40, 1, 0, 33),
}
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


def problem_of(op, dtype=torch.float32, batch=BATCHES["holes, packed"], p=0.3, size=96, heads=3):
    """A small problem of each op, with all that it has: bias, dropout, key bias; and `size` features, of all heads."""
    return {
        "attention": lambda: attention_problem(batch, dtype, heads, size // heads, p),
        "bias_gelu": lambda: bias_gelu_problem(batch, dtype, size, activation="gelu", p=p, bias=dtype),
        "add_norm": lambda: add_norm_problem(batch, dtype, size, p, bias=dtype),
        "embeddings": lambda: embeddings_problem(batch, dtype, size, p),
    }[op]()


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


def views(x):
    """The same values, laid out in other ways."""
    yield x.t().contiguous().t()
    yield torch.stack([x, x + 1], dim=2)[..., 0]


def naive_attention(qkv, batch, heads, scale, p):
    """One query at a time, by the definition."""
    sequence_ids, (key_bias, key_ranges) = batch.sequences.sequence_ids, batch.sequences[-2:]
    query, key, value = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    out = torch.zeros_like(query)
    for i, h in itertools.product(range(batch.tokens), range(heads)):
        sequence, column = sequence_ids[i], batch.columns[i]
        keys = (sequence_ids == sequence).nonzero().squeeze(1)
        if key_ranges is not None:
            first, end = key_ranges[i].clamp(min=0).tolist()
            keys = keys[first:end]
        weights = torch.exp(key[keys, h] @ query[i, h] * scale)
        if key_bias is not None:
            weights = weights * key_bias[keys].to(qkv.dtype).exp()
            if not weights.any():
                continue
        weights = weights / weights.sum()
        if p:
            mask = dropout_mask(SEED, p, 512, column, sequence, h)[batch.columns[keys]]
            weights = weights * mask / (1 - p)
        out[i, h] = weights @ value[keys, h]
    return out.flatten(1)
