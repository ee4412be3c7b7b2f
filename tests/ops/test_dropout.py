"""Counter-based dropout: the generator's bits, the masks' statistics, and what they may depend on."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from erniem_fast import dropout, ops, use_kernels
from erniem_fast.batch import TokenBatch, key_bias_of
from erniem_fast.ops import Product
from tests.ops.problems import serving

ONES = 0xFFFFFFFF
# The digits of pi that Random123 takes for its third case, and a key that is negative as an int64.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
SEEDS = (0, 1, 2**31, 2**32 + 7, 2**63 - 2, 0x299F31D0A4093822, -1)


def philox_of_integers(seed, counter, rounds=dropout.ROUNDS):
    """Philox4x32 as Salmon et al. define it (SC 2011, section 3.3), on Python's integers."""
    x0, x1, x2, x3 = counter
    key_0, key_1 = seed % 2**32, (seed >> 32) % 2**32
    for _ in range(rounds):
        high_0, low_0 = divmod(0xD2511F53 * x0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high_1 ^ x1 ^ key_0, low_1, high_0 ^ x3 ^ key_1, low_0
        key_0, key_1 = (key_0 + 0x9E3779B9) % 2**32, (key_1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def kept_of_integers(seed, p, last, column, sequence, head):
    word = philox_of_integers(seed, (last // 4, column, sequence, head))[last % 4]
    return word >= round(p * 2**32)


def int64(*values):
    return [torch.tensor([value]) for value in values]


# Random123's kat_vectors, of its release 1.09.
@pytest.mark.parametrize(
    ("rounds", "seed", "counter", "words"),
    [
        (7, 0, (0, 0, 0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, -1, (ONES, ONES, ONES, ONES), "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, 0x299F31D0A4093822, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, 0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, -1, (ONES, ONES, ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, 0x299F31D0A4093822, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(rounds, seed, counter, words):
    expected = tuple(int(word, 16) for word in words.split())
    assert philox_of_integers(seed, counter, rounds) == expected
    computed = dropout.philox(torch.tensor([seed]), *int64(*counter), rounds=rounds)
    assert tuple(word.item() for word in computed) == expected


def test_seven_rounds():
    computed = dropout.philox(torch.tensor([0]), *int64(0, 0, 0, 0))
    assert [word.item() for word in computed] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rounds", [1, 7])
def test_words_are_those_of_integer_arithmetic(seed, rounds):
    counters = torch.randint(0, 2**32, (4, 64), generator=torch.Generator().manual_seed(seed % 2**32))
    computed = torch.stack(dropout.philox(torch.tensor([seed]), *counters, rounds=rounds), dim=1)
    assert computed.tolist() == [list(philox_of_integers(seed, each, rounds)) for each in counters.T.tolist()]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_masks_are_those_of_integer_arithmetic(seed, p):
    width, columns, sequence_ids = 11, [0, 3, 511], [0, 2, 70_000]
    column, sequence = torch.tensor(columns), torch.tensor(sequence_ids)
    features = dropout.dropout_mask(torch.tensor([seed]), p, width, column, sequence)
    assert features.dtype == torch.bool
    assert features.tolist() == [
        [kept_of_integers(seed, p, last, c, s, 0) for last in range(width)]
        for c, s in zip(columns, sequence_ids, strict=True)
    ]
    heads = torch.arange(2)[:, None, None]
    attention = dropout.dropout_mask(torch.tensor(seed), p, width, column.int(), sequence.int()[:, None], heads)
    assert attention.tolist() == [
        [[[kept_of_integers(seed, p, last, c, s, h) for last in range(width)] for c in columns] for s in sequence_ids]
        for h in range(2)
    ]


TRITON = """
import sys, torch, triton, triton.language as tl

@triton.jit
def write_words(out_ptr, seed_ptr, c1, c2, c3, ROUNDS: tl.constexpr):
    c0 = tl.arange(0, 16)
    words = tl.philox(tl.load(seed_ptr), c0, c0 * 0 + c1, c0 * 0 + c2, c0 * 0 + c3, n_rounds=ROUNDS)
    for word in tl.static_range(4):
        tl.store(out_ptr + 4 * c0 + word, words[word])

seed, *coordinates, rounds = map(int, sys.argv[1:])
out = torch.zeros(64, dtype=torch.int32)
write_words[(1,)](out, torch.tensor([seed]), *coordinates, rounds)
print(*(out.long() % 2**32).tolist())
"""


def test_triton_has_the_same_bits(tmp_path):
    pytest.importorskip("triton")
    seed, coordinates = 0x299F31D0A4093822, (7, 70_000, 3)
    script = tmp_path / "words.py"
    script.write_text(TRITON)
    arguments = map(str, (seed, *coordinates, dropout.ROUNDS))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = subprocess.check_output([sys.executable, script, *arguments], env=environment, text=True)
    computed = dropout.philox(torch.tensor([seed]), torch.arange(16), *int64(*coordinates))
    assert [int(word) for word in words.split()] == torch.stack(computed, dim=1).flatten().tolist()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    side = torch.arange(100)
    keep = dropout.dropout_mask(torch.tensor([20_231]), p, 1_000, side, side[:, None])
    assert keep.numel() == 10**7
    standard_error = math.sqrt(p * (1 - p) / keep.numel())
    assert keep.double().mean().item() == pytest.approx(1 - p, rel=0, abs=4 * standard_error)


def test_no_feature_and_no_token_is_favoured():
    side = torch.arange(100)
    keep = dropout.dropout_mask(torch.tensor([20_232]), 0.5, 1_000, side, side[:, None]).double()
    for rates, elements in ((keep.mean(dim=(0, 1)), 10**4), (keep.mean(dim=2), 10**3)):
        assert (rates - 0.5).abs().max().item() < 6 * 0.5 / math.sqrt(elements)


def test_probability_to_32_bits():
    rates = (0.0, 0.1, 0.5, 1 - 2**-32, 1 - 2**-34, 1.0)
    assert [dropout.threshold(p) for p in rates] == [0, 429_496_730, 2**31, 2**32 - 1, 2**32, 2**32]
    assert [dropout.rescale(p) for p in rates] == [1.0, 1 / 0.9, 2.0, 2.0**32, 0.0, 0.0]


def test_nothing_is_dropped_at_zero_and_everything_at_one():
    seed, columns, sequence_ids = torch.tensor([5]), torch.arange(200), torch.zeros(200, dtype=torch.long)
    x = torch.randn(200, 37)
    x[3, 4] = torch.nan
    x[5, 6] = torch.inf
    for p, kept, expected in ((0.0, True, x), (1.0, False, torch.zeros_like(x))):
        keep = dropout.dropout_mask(seed, p, 37, columns, sequence_ids)
        assert bool((keep == kept).all())
        torch.testing.assert_close(dropout.apply_mask(x, keep, p), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_dropped_is_zero_whatever_it_was(dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0], dtype=dtype)
    keep = torch.tensor([False, False, False, True])
    out = dropout.apply_mask(x, keep, 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", serving("bias_gelu", interpreted=True))
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_kept_values_and_gradients_are_rescaled_exactly(p, implementation):
    batch = TokenBatch.padded((3, 40), torch.device("cpu"))
    x, grad = torch.rand(120, 50).add(0.1).requires_grad_(), torch.randn(120, 50)
    seed = torch.tensor([77])
    with use_kernels(bias_gelu=implementation):
        out = ops.bias_gelu(Product(x), "relu", batch.dropout(p, seed))
    (grad_x,) = torch.autograd.grad(out, x, grad)
    keep = dropout.dropout_mask(seed, p, 50, batch.columns, batch.sequences.sequence_ids)
    assert 0 < keep.sum().item() < keep.numel()
    for computed, value in ((out, x), (grad_x, grad)):
        assert torch.equal(computed, torch.where(keep, value * (1 / (1 - p)), 0.0))


def masks_of_coordinates():
    """Masks of 256 tokens by 256 features, each with one thing changed in what it is drawn from."""
    column, sequence = torch.arange(16).repeat(16), torch.arange(16).repeat_interleave(16)

    def mask(seed=12, width=256, columns=column, sequence_ids=sequence, head=0):
        return dropout.dropout_mask(torch.tensor([seed]), 0.5, width, columns, sequence_ids, head)

    return {
        "itself": mask(),
        "next feature": mask(width=257)[:, 1:],
        "next but one feature": mask(width=258)[:, 2:],
        "next group of features": mask(width=260)[:, 4:],
        "column beyond": mask(columns=column + 16),
        "sequence beyond": mask(sequence_ids=sequence + 16),
        "column for sequence": mask(columns=sequence + 20, sequence_ids=column),
        "next head": mask(head=1),
        "head for sequence": mask(sequence_ids=torch.zeros_like(sequence), head=sequence + 20),
        "next seed": mask(seed=13),
        "seed with another high half": mask(seed=12 + 2**32),
        "seed with its halves exchanged": mask(seed=12 * 2**32),
    }


def test_masks_of_different_coordinates_are_independent():
    masks = {name: 2.0 * mask.float().flatten() - 1.0 for name, mask in masks_of_coordinates().items()}
    correlations = {(a, b): (masks[a] * masks[b]).mean().item() for a, b in itertools.combinations(masks, 2)}
    # The mean of 65,536 products of independent signs has a standard error of 1 / 256.
    assert {pair: value for pair, value in correlations.items() if abs(value) > 5 / 256} == {}


def test_tokens_of_a_mask_are_independent():
    signs = 2.0 * masks_of_coordinates()["itself"].double() - 1.0
    for rows in (signs, signs.T):
        correlations = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0.0)
        # 32,640 pairs of 256 signs: 6 standard errors of 1 / 16 are exceeded once in 15,000 draws.
        assert correlations.abs().max().item() < 6 / 16


def test_manual_seed_reproduces():
    torch.manual_seed(3)
    first, second = dropout.draw_seeds(4, torch.device("cpu")), dropout.draw_seeds(4, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(dropout.draw_seeds(4, torch.device("cpu")), first)
    assert first.shape == (4,)
    assert first.dtype == torch.int64
    assert len({*first.tolist(), *second.tolist()}) == 8


def test_seeds_fill_63_bits():
    torch.manual_seed(4)
    seeds = dropout.draw_seeds(1_000, torch.device("cpu"))
    assert bool((seeds >= 0).all())
    rates = torch.stack([seeds >> bit & 1 for bit in range(63)]).double().mean(dim=1)
    assert (rates - 0.5).abs().max().item() < 5 * 0.5 / math.sqrt(1_000)


MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 0, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def layouts(keep_first):
    packed = TokenBatch.from_mask(MASK, keep_first=keep_first)
    return packed, TokenBatch.padded(tuple(MASK.shape), MASK.device, key_bias_of(MASK))


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("implementation", serving("bias_gelu", interpreted=True))
def test_features_have_the_same_mask_in_both_layouts(implementation, keep_first):
    packed, padded = layouts(keep_first)
    seed = torch.tensor([8])
    with use_kernels(bias_gelu=implementation):
        masks = [
            batch.unpack(ops.bias_gelu(Product(torch.ones(batch.tokens, 50)), "relu", batch.dropout(0.4, seed)))
            for batch in (packed, padded)
        ]
    assert torch.equal(masks[0][MASK], masks[1][MASK])
    assert 0.3 < (masks[0][MASK] == 0).float().mean().item() < 0.5


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("implementation", serving("attention", interpreted=True))
def test_attention_has_the_same_mask_in_both_layouts(implementation, keep_first):
    packed, padded = layouts(keep_first)
    seed, heads, head_dim = torch.tensor([9]), 2, 32
    pairs = []
    for batch in (packed, padded):
        # A key's value is the unit vector of its column, so that a result holds the dropped probabilities.
        values = torch.eye(head_dim)[batch.columns].repeat(1, heads)
        qkv = torch.cat([torch.zeros(batch.tokens, 2 * heads * head_dim), values], dim=1)
        with use_kernels(attention=implementation):
            out = ops.attention(qkv, batch, heads, 1.0, batch.dropout(0.4, seed))
        pairs.append(batch.unpack(out)[MASK].unflatten(1, (heads, head_dim))[..., : MASK.shape[1]])
    real = MASK[MASK.nonzero()[:, 0]][:, None, :].expand_as(pairs[0])
    assert torch.equal(pairs[0] != 0, pairs[1] != 0)
    assert not bool((pairs[0] != 0)[~real].any())
    torch.testing.assert_close(pairs[0], pairs[1], rtol=0, atol=1e-6)
    keep = pairs[0][real] != 0
    assert 0.3 < 1 - keep.float().mean().item() < 0.5


@pytest.mark.parametrize("implementation", serving("attention", interpreted=True))
def test_attention_draws_by_sequence_head_query_and_key(implementation):
    """Against integer arithmetic: keys along the word, queries, sequences and heads in the counter's other places."""
    batch, _ = layouts(keep_first=False)
    seed, heads, head_dim, p = 0x299F31D0A4093822, 3, 32, 0.5
    values = torch.eye(head_dim)[batch.columns].repeat(1, heads)
    qkv = torch.cat([torch.zeros(batch.tokens, 2 * heads * head_dim), values], dim=1)
    with use_kernels(attention=implementation):
        out = ops.attention(qkv, batch, heads, 1.0, batch.dropout(p, torch.tensor([seed]))).unflatten(
            1, (heads, head_dim)
        )
    expected = torch.zeros_like(out)
    for token, (query, sequence) in enumerate(
        zip(batch.columns.tolist(), batch.sequences.sequence_ids.tolist(), strict=True)
    ):
        keys = batch.columns[batch.sequences.sequence_ids == sequence].tolist()
        for head, key in itertools.product(range(heads), keys):
            if kept_of_integers(seed, p, key, query, sequence, head):
                expected[token, head, key] = 1 / len(keys) / (1 - p)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
