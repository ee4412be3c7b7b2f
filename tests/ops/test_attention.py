"""Attention, by every implementation that a CPU runs."""

import itertools
from dataclasses import replace

import pytest
import torch

from erniem_fast import ops, use_kernels
from erniem_fast.batch import TokenBatch, key_bias_of
from tests.batches import dropout_of, sequences
from tests.ops.problems import (
    BATCHES,
    CPU,
    DTYPES,
    assert_rule_one,
    attention_problem,
    each_implementation,
    largest,
    randn,
    serving,
    solve,
    views,
)


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
        ("biases", 2, 64, 0.0),
        ("biases", 3, 32, 0.3),
        ("ranges", 2, 64, 0.0),
        ("ranges", 1, 32, 0.3),
        ("biases and ranges", 2, 32, 0.1),
        ("no tokens", 3, 32, 0.1),
    ],
)
def test_attention(implementation, dtype, batch, heads, head_dim, p):
    with use_kernels(attention=implementation):
        assert_rule_one(attention_problem(BATCHES[batch], dtype, heads, head_dim, p))


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


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_key_with_the_bias_log_n_stands_for_n_equal_keys(implementation, dtype, p):
    """In the results of the others; with dropout, one mask stands for n, so only what needs no key of it is equal."""
    one, many = sequences(5, 21), sequences(5, 20 + 37)
    qkv = randn(26, 3 * 64, dtype=dtype)
    repeated = torch.cat([qkv, qkv[-1:].expand(36, -1)])
    key_bias = torch.zeros(26)
    key_bias[-1] = torch.tensor(37.0).log()
    one = replace(one, sequences=one.sequences._replace(key_bias=key_bias))
    if p:
        qkv[-1, 128:], repeated[25:, 128:] = 0.0, 0.0
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, one, 2, 0.2, dropout_of(one, p))
        expected = ops.attention(repeated, many, 2, 0.2, dropout_of(many, p))
    torch.testing.assert_close(out, expected[:26], rtol=0, atol=16 * torch.finfo(dtype).eps)


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keys_outside_of_a_range_reach_nothing(implementation, dtype, p):
    """By the bits of results and gradients: what stands there changes none."""
    batch = sequences(70, 20)
    ranges = torch.tensor([[16, 40]]).expand(90, 2).int()
    seen = ((batch.columns >= 16) & (batch.columns < 40))[:, None]
    qkv, grad, found = randn(90, 3 * 64, dtype=dtype), randn(90, 64, dtype=dtype), []
    for other in (1.0, 3.0):
        x = qkv.clone()
        x[:, 64:] = torch.where(seen, x[:, 64:], x[:, 64:] * other)
        x.requires_grad_()
        with use_kernels(attention=implementation):
            out = ops.attention(x, batch.attending_to(ranges), 2, 0.2, dropout_of(batch, p))
        (grad_qkv,) = torch.autograd.grad(out, x, grad)
        assert not grad_qkv[:, 64:][~seen.expand(-1, 128)].any()
        found.append((out, grad_qkv))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif("native" not in serving("attention"), reason="the native library cannot be built here")
def test_native_attention_leaves_out_keys_that_no_query_of_a_block_sees():
    """NaN among them does not reach the result, not even times 0."""
    batch, qkv = sequences(512), torch.randn(512, 3 * 32)
    half = batch.columns // 256 * 256
    batch = batch.attending_to(torch.stack([half, half + 256], dim=1).int())
    with use_kernels(attention="native"):
        expected = ops.attention(qkv, batch, 1, 0.2)
        qkv[:192] = torch.nan  # a block of queries may have some of both halves
        assert torch.equal(ops.attention(qkv, batch, 1, 0.2)[288:], expected[288:])


def test_key_ranges_are_checked():
    batch = sequences(3, 4)
    for shape, dtype in (((7,), torch.int32), ((7, 3), torch.int32), ((7, 2), torch.int64)):
        with pytest.raises(ValueError, match=r"key_ranges has shape .* for 7 tokens it must have shape \(7, 2\)"):
            batch.attending_to(torch.zeros(shape, dtype=dtype))


def test_key_biases_are_checked():
    batch = sequences(3, 4)
    for key_bias, message in (
        (torch.zeros(6), r"key_bias has shape \(6,\) and dtype torch.float32; for 7 tokens it must have shape \(7,\)"),
        (torch.zeros(7, dtype=torch.bool), r"key_bias has shape \(7,\) and dtype torch.bool; .* dtype torch.float32"),
        (torch.zeros(7, requires_grad=True), r"key_bias requires gradients, .* pass key_bias.detach\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, sequences=batch.sequences._replace(key_bias=key_bias))


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


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sequences_without_keys_give_zeros(implementation, dtype, p):
    batch = sequences(4, 70, 0, 1, 5)
    empty = torch.zeros(80, dtype=torch.bool)
    empty[4:75] = True  # of the sequences of 70 and of 1
    batch = replace(batch, sequences=batch.sequences._replace(key_bias=key_bias_of(~empty)))
    qkv = randn(80, 3 * 64, dtype=dtype).requires_grad_()
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, batch, 2, 32**-0.5, dropout_of(batch, p))
    (grad_qkv,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    for each in (out, grad_qkv):
        assert torch.equal(each[empty], torch.zeros_like(each[empty]))
        assert bool(each.isfinite().all())
        assert bool((each[~empty] != 0).any())


@each_implementation("attention", interpreted=True)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_sequences(implementation, dtype, p):
    qkv = torch.empty(0, 3 * 64, dtype=dtype, requires_grad=True)
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, sequences(), 2, 32**-0.5, dropout_of(sequences(), p))
    (grad_qkv,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert (out.shape, out.dtype) == ((0, 64), dtype)
    assert (grad_qkv.shape, grad_qkv.dtype) == ((0, 192), dtype)


@each_implementation("attention", interpreted=True)
def test_one_token_attends_to_itself(implementation, dtype):
    qkv = randn(3, 3 * 64, dtype=dtype).requires_grad_()
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, sequences(1, 1, 1), 2, 32**-0.5)
    grad = torch.randn_like(out)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    expected = torch.cat([torch.zeros(3, 128, dtype=dtype), grad], dim=1)
    # The probability, its inverse and the result are rounded in float32.
    torch.testing.assert_close(out, qkv[:, 128:], rtol=1.5 * 2.0**-23, atol=0)
    torch.testing.assert_close(grad_qkv, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


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


@pytest.mark.parametrize("implementation", serving("attention", interpreted=True))
def test_heads_that_do_not_divide_what_there_is(implementation):
    batch, qkv = BATCHES["short"], torch.randn(BATCHES["short"].tokens, 3 * 64)
    with use_kernels(attention=implementation), pytest.raises(ValueError, match="qkv has 192 features, which 5 heads"):
        ops.attention(qkv, batch, 5, 0.1)


@pytest.mark.parametrize("implementation", serving("attention", interpreted=True))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_loose_bound_of_lengths(implementation, p):
    qkv, batches = torch.randn(12, 3 * 64), [sequences(3, 0, 9, bound=bound) for bound in (9, 512)]
    with use_kernels(attention=implementation):
        tight, loose = (ops.attention(qkv, batch, 2, 0.2, dropout_of(batch, p)) for batch in batches)
    torch.testing.assert_close(loose, tight, rtol=0, atol=1e-6)


@pytest.mark.skipif("native" not in serving("attention"), reason="the native library cannot be built here")
@pytest.mark.parametrize("bounds", [[0, 4, 9], [0, 4, 7], [1, 4, 8], [0, 9, 8], [0, 8]], ids=str)
def test_native_attention_refuses_bounds_beyond_the_tokens(bounds):
    """As a compiled or traced model may pass them: it would write into memory that is not its own."""
    batch = sequences(4, 4)
    bounds = batch.sequences._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    batch = replace(batch, sequences=bounds)
    with use_kernels(attention="native"), pytest.raises((RuntimeError, ValueError), match="cu_seqlens"):
        ops.attention(torch.randn(8, 3 * 32), batch, heads=2, scale=1.0)


@pytest.mark.parametrize("batch", ["unequal", "holes, packed", "holes, padded", "biases and ranges", "no tokens"])
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
