"""The Triton kernels of attention against the reference."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from erniem_fast import ops, reference
from erniem_fast.batch import TokenBatch, key_bias_of
from erniem_fast.dropout import dropout_mask
from erniem_fast.flags import use_kernels
from erniem_fast.kernels import attention
from erniem_fast.kernels.attention_configs import Config
from erniem_fast.kernels.device import Device, describe
from tests.batches import dropout_of, ranged, sequences
from tests.kernels.comparison import DEVICE, SEED, assert_equivalent, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HARD_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 0, 127, 128, 129)


@pytest.fixture(params=[False, True], ids=["two passes", "one pass"])
def design(request, monkeypatch):
    """Of the backward."""
    if request.param and attention.one_pass_config(describe(DEVICE).arch, torch.float16, 64, 64) is None:
        pytest.skip("on this architecture the backward takes two passes")
    monkeypatch.setattr(attention, "backward", partial(attention.backward, one_pass=request.param))


def batch_with_holes(lengths):
    """Packed sequences of these lengths, each at the end of a row that starts with padding and has a hole."""
    mask = torch.zeros(len(lengths), max(lengths) + 3, dtype=torch.bool, device=DEVICE)
    for row, length in zip(mask, lengths, strict=True):
        row[len(row) - length :] = True
        row[-1 - length // 2] = row[-1 - length] = length < 2
        row[-length - 1] = length >= 2
    return TokenBatch.from_mask(mask, keep_first=False)


def inputs_of(batch, heads, head_dim, dtype):
    return [torch.randn(batch.tokens, 3 * heads * head_dim, device=DEVICE).to(dtype)]


def kernel(batch, heads, p, seed, qkv):
    with use_kernels(attention="triton"):
        return ops.attention(qkv, batch, heads, (qkv.shape[1] // (3 * heads)) ** -0.5, dropout_of(batch, p, seed))


def oracle(batch, heads, p, seed, qkv):
    scale = (qkv.shape[1] // (3 * heads)) ** -0.5
    return reference.attention(qkv, batch.sequences, heads, scale, dropout_of(batch, p, seed))


def check(batch, heads, head_dim, dtype, p=0.1, seed=SEED):
    case = (batch, heads, p, seed)
    assert_equivalent(partial(kernel, *case), partial(oracle, *case), inputs_of(batch, heads, head_dim, dtype))


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_lengths(dtype, seed, design):
    check(sequences(*HARD_LENGTHS, device=DEVICE), 2, 64, dtype, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 32, 48, 64, 128, 256])
def test_head_dims(head_dim, dtype, design):
    check(sequences(40, 70, device=DEVICE), 2, head_dim, dtype)


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize("lengths", [(1, 2, 0, 31, 32), (15, 0, 17, 33, 63, 64)], ids=["32", "64"])
def test_lengths_of_one_tile(lengths, seed, design):
    check(sequences(*lengths, device=DEVICE), 2, 64, torch.bfloat16, seed=seed)
    check(ranged(*lengths, device=DEVICE), 1, 64, torch.bfloat16, seed=seed)


def test_very_unequal_lengths(design):
    check(sequences(1, 257, 3, device=DEVICE), 1, 32, torch.bfloat16)


def test_dropout_follows_columns_where_sequences_have_holes(design):
    batch = batch_with_holes([1, 9, 40])
    assert not batch.sequences.contiguous
    check(batch, 2, 32, torch.float32, p=0.3)


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_layout_with_a_key_mask(dtype, seed, design):
    """Rows with padding at the right, at the left, with holes, and without a single key."""
    mask = torch.ones(4, 70, dtype=torch.bool, device=DEVICE)
    mask[0, 33:] = False
    mask[1, :66] = False
    mask[2, ::3] = False
    mask[3] = False
    batch = TokenBatch.padded((4, 70), DEVICE, key_bias_of(mask))
    check(batch, 2, 32, dtype, seed=seed)
    out, grad_qkv = run(partial(kernel, batch, 2, 0.1, seed), inputs_of(batch, 2, 32, dtype))
    assert torch.equal(out[3 * 70 :], torch.zeros_like(out[3 * 70 :]))
    assert torch.equal(grad_qkv[3 * 70 :], torch.zeros_like(grad_qkv[3 * 70 :]))


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_ranges_and_biases(dtype, seed, design):
    batch = ranged(70, 1, 0, 130, device=DEVICE)
    check(batch, 1, 32, dtype, seed=seed)
    key_bias = 3 * torch.randn(batch.tokens, device=DEVICE)
    key_bias[::5] = -torch.inf
    check(replace(batch, sequences=batch.sequences._replace(key_bias=key_bias)), 1, 32, dtype, seed=seed)


def test_tiles_that_no_query_sees_are_left_out():
    """Forward and in two passes: NaN in a half of a sequence does not reach the other, not even times 0."""
    batch = sequences(512, device=DEVICE)
    half = batch.columns // 256 * 256
    batch = batch.attending_to(torch.stack([half, half + 256], dim=1).int())
    (qkv,) = inputs_of(batch, 1, 32, torch.float32)
    clean = run(partial(kernel, batch, 1, 0.0, None), [qkv])
    qkv[:256] = torch.nan
    for result, expected in zip(run(partial(kernel, batch, 1, 0.0, None), [qkv]), clean, strict=True):
        assert torch.equal(result[256:], expected[256:])


def test_packed_and_padded_give_the_same_tokens_the_same_mask(design):
    """The padded rows are longer by a tail of masked keys, which shifts every tile boundary of later sequences."""
    lengths, columns = [5, 40, 17], 45
    mask = torch.arange(columns, device=DEVICE)[None, :] < torch.tensor(lengths, device=DEVICE)[:, None]
    padded = TokenBatch.padded((3, columns), DEVICE, key_bias_of(mask))
    packed = TokenBatch.from_mask(mask, keep_first=False)
    qkv = torch.randn(3, columns, 3 * 64, device=DEVICE)
    of_packed = run(partial(kernel, packed, 2, 0.3, SEED), [packed.pack(qkv)])
    grad = mask.view(-1, 1).float().expand(-1, 64)
    of_padded = run(partial(kernel, padded, 2, 0.3, SEED), [padded.pack(qkv)], grad)
    for one, other in zip(of_packed, of_padded, strict=True):
        torch.testing.assert_close(one, other[mask.flatten()], rtol=0, atol=2e-6)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("arch", "block", "step"), [("sm_90", 16, 16), ("sm_90", 32, 64), ("sm_90", 64, 32), ("gfx942", 16, 8)]
)
def test_dropout_draws_the_bits_of_the_reference(arch, block, step, contiguous, design, monkeypatch):
    """Equal scores, and values that are the unit vectors of the keys: the output is the mask, whatever the tiles.

    Architectures differ in the order in which keys are read.
    """
    config = Config(block, step, warps=4, stages=1)
    monkeypatch.setattr(attention, "describe", lambda _: Device(arch, 132, 32))
    for name in ("forward_config", "backward_config", "one_pass_config"):
        monkeypatch.setattr(attention, name, lambda *_: config)
    length, heads = 64, 2
    batch = sequences(3, length, device=DEVICE)
    batch = replace(batch, sequences=batch.sequences._replace(contiguous=contiguous))
    qkv = torch.zeros(batch.tokens, 3, heads, length, device=DEVICE)
    qkv[3:, 2] = torch.eye(length, device=DEVICE)[:, None]
    out, grad_qkv = run(partial(kernel, batch, heads, 0.25, SEED), [qkv.flatten(1)], torch.eye(67, 128, device=DEVICE))

    mask = dropout_mask(
        SEED,
        0.25,
        length,
        batch.columns[3:, None],
        batch.sequences.sequence_ids[3:, None],
        torch.arange(heads, device=DEVICE),
    )
    exact = mask / (length * 0.75)
    torch.testing.assert_close(out[3:].unflatten(1, (heads, length)), exact, rtol=1e-6, atol=0)
    # The gradient of a key's value is the sum over queries of what they took of it: query q asked for feature q + 3.
    grad_value = grad_qkv[3:].unflatten(1, (3, heads, length))[:, 2, 0, 3:].t()
    torch.testing.assert_close(grad_value, exact[: length - 3, 0], rtol=1e-6, atol=0)


def test_large_scores_do_not_overflow(design):
    """Scores of about 100, whose exponentials float32 cannot hold.

    Rounding a score of float32, a sum of 32 products, moves a probability by some 2^-24 of its size.
    """
    batch = sequences(65, device=DEVICE)
    qkv = 6 * inputs_of(batch, 1, 32, torch.float32)[0]
    query, key, _ = qkv.double().unflatten(1, (3, 32)).unbind(1)
    largest = (query @ key.t()).abs().max().item() * 32**-0.5
    assert largest > 89
    results = run(partial(kernel, batch, 1, 0.0, None), [qkv])
    exact = run(partial(oracle, batch, 1, 0.0, None), [qkv.double()])
    for output, truth in zip(results, exact, strict=True):
        error = (output - truth).abs().max() / truth.abs().max()
        assert error < 2 * 2**-24 * largest


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("root", [288.0, 896.0], ids=["1e4", "1e5"])
def test_tying_keys_beside_large_scores(root, layout, dtype, seed, design):
    """Scores of 10,368 or 100,352 and a little, all exact in float32: what is lost would be lost by the softmax.

    The sums of 70 products lose up to 3.8 units in the last place (1,000 draws), a wrong tie a thousand times that.
    """
    mask = torch.rand(3, 70, device=DEVICE) < 0.6
    mask[1] = False
    batch = (
        TokenBatch.padded((3, 70), DEVICE, key_bias_of(mask))
        if layout == "padded"
        else sequences(70, 1, 65, device=DEVICE)
    )
    qkv = inputs_of(batch, 1, 64, dtype)[0]
    qkv[:, :128] = qkv[:, :128].round()
    qkv[:, [0, 64]] = root
    case = (batch, 1, 0.1, seed)
    grad = torch.randn(batch.tokens, 64, device=DEVICE).to(dtype)
    results, exact = (run(partial(op, *case), [x], grad) for op, x in ((kernel, qkv), (oracle, qkv.double())))
    grad_value, exact_grad_value = results[1][:, 128:], exact[1][:, 128:]
    for result, truth in ((results[0], exact[0]), (grad_value, exact_grad_value)):
        assert (result - truth).abs().max() <= 6 * torch.finfo(dtype).eps * truth.abs().max()
    assert_equivalent(partial(kernel, *case), partial(oracle, *case), [qkv])


def test_no_tokens():
    out, grad_qkv = run(
        partial(kernel, sequences(0, 0, device=DEVICE), 2, 0.1, SEED), [torch.zeros(0, 192, device=DEVICE)]
    )
    assert (out.shape, grad_qkv.shape) == ((0, 64), (0, 192))


def test_other_sequences_stay_apart(design):
    """Whatever stands beside a sequence, NaN even, does not reach it."""
    batch = sequences(5, 20, 9, device=DEVICE)
    (qkv,) = inputs_of(batch, 2, 32, torch.float32)
    alone = run(partial(kernel, batch, 2, 0.0, None), [qkv])
    qkv[:5], qkv[25:] = torch.nan, torch.nan
    beside = run(partial(kernel, batch, 2, 0.0, None), [qkv])
    assert all(torch.equal(left[5:25], right[5:25]) for left, right in zip(alone, beside, strict=True))


def test_inputs_that_are_not_contiguous():
    batch = sequences(5, 20, device=DEVICE)
    (qkv,) = inputs_of(batch, 2, 32, torch.float32)
    case = partial(kernel, batch, 2, 0.1, SEED)
    strided, dense = run(case, [qkv.t().contiguous().t()]), run(case, [qkv])
    assert all(torch.equal(left, right) for left, right in zip(strided, dense, strict=True))


@pytest.mark.parametrize(
    ("pairs", "max_seqlen", "dropout", "one_pass"),
    [
        (1, 128, False, True),  # a block holds all keys
        (1, 129, True, False),
        (263, 129, True, False),
        (264, 129, True, True),  # two for each multiprocessor, and a mask that need not be drawn twice
        (264, 129, False, False),
    ],
)
def test_the_design_of_the_backward(pairs, max_seqlen, dropout, one_pass):
    case = (pairs, max_seqlen, dropout)
    archs = (("sm_80", 32, one_pass), ("sm_90", 32, False), ("gfx942", 64, one_pass), ("gfx1100", 32, False))
    for arch, lanes, expected in archs:
        config = attention.one_pass_config(arch, torch.bfloat16, 64, max_seqlen)
        assert attention.takes_one_pass(config, *case, Device(arch, 132, lanes)) is expected


@pytest.mark.parametrize(
    ("pairs", "max_seqlen", "dropout", "one_pass"),
    [
        (1, 1, False, True),
        (1, 64, True, True),
        (264, 65, False, False),
        (263, 65, True, False),
        (264, 65, True, True),
        (264, 128, True, True),
        (264, 129, True, False),
        (264, 512, True, False),
    ],
)
def test_the_design_of_the_backward_on_hopper(pairs, max_seqlen, dropout, one_pass):
    """As it was timed there, with heads of 64 in 16 bits."""
    config = attention.one_pass_config("sm_90", torch.bfloat16, 64, max_seqlen)
    assert attention.takes_one_pass(config, pairs, max_seqlen, dropout, Device("sm_90", 132, 32)) is one_pass
    wide = attention.one_pass_config("sm_90", torch.float32, 64, max_seqlen)
    assert attention.takes_one_pass(wide, pairs, max_seqlen, dropout, Device("sm_90", 132, 32)) is (max_seqlen <= 16)


@pytest.mark.parametrize(("arch", "expected"), [("sm_90", "tf32"), ("gfx90a", "ieee"), ("gfx1100", "ieee")])
def test_products_of_float32_in_lower_precision(arch, expected):
    """Where PyTorch's own may be in TF32: AMD's compiler would refuse it."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert attention._precision(arch, torch.float32) == expected
        assert attention._precision(arch, torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert attention._precision(arch, torch.float32) == "ieee"


def test_backward_is_deterministic(design):
    batch = sequences(5, 70, device=DEVICE)
    inputs = inputs_of(batch, 2, 32, torch.float32)
    case = partial(kernel, batch, 2, 0.1, SEED)
    assert all(torch.equal(left, right) for left, right in zip(run(case, inputs), run(case, inputs), strict=True))


def test_head_dims_beyond_256_are_refused():
    batch = sequences(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="up to 256, not 512; choose `torch`"):
        kernel(batch, 1, 0.0, None, torch.zeros(4, 3 * 512, device=DEVICE))


BEYOND_INT32 = """
import torch
from erniem_fast.batch import Sequences, key_bias_of
from erniem_fast.dropout import Dropout
from erniem_fast.kernels import attention

def run(tokens):
    \"\"\"One sequence of 20 at the end of so many tokens, of which no other is ever touched.\"\"\"
    torch.manual_seed(0)
    qkv, grad = torch.empty(tokens, 3 * 1024, dtype=torch.half), torch.empty(tokens, 1024, dtype=torch.half)
    qkv[-20:], grad[-20:] = torch.randn(20, 3 * 1024), torch.randn(20, 1024)
    columns = torch.zeros(tokens, dtype=torch.int64)
    columns[-20:] = torch.arange(20).flip(0)
    cu_seqlens = torch.tensor([tokens - 20, tokens], dtype=torch.int32)
    sequences = Sequences(cu_seqlens, 20, torch.zeros(1, dtype=torch.int64), False, columns, key_bias_of(columns != 7))
    case = (sequences, 16, 0.125, Dropout(0.1, torch.tensor([5]), columns, columns))
    out, statistics = attention.forward(qkv, *case)
    grad_qkv = attention.backward(grad, out, statistics, qkv, *case, one_pass={one_pass})
    return out[-20:], statistics[..., -20:], grad_qkv[-20:]

tokens = 2**31 // (3 * 1024) + 21
for near, far in zip(run(20), run(tokens), strict=True):
    assert near.any() and torch.equal(near, far)
"""


@pytest.mark.skipif(DEVICE.type == "cuda", reason="an interpreter's memory is what can be left untouched")
@pytest.mark.parametrize("one_pass", [False, True])
def test_elements_beyond_the_reach_of_int32(one_pass):
    """In a process of its own, which an address that wraps around kills."""
    code = BEYOND_INT32.format(one_pass=one_pass)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
