"""What takes a GPU: sizes of real batches and beyond 2^31 elements, graphs, the sanitizer.

`make gpu` runs what is marked. Without a GPU the same code runs in the interpreter, and small, so that the tests
themselves are tried.
"""

import copy
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from triton import knobs

import erniem_fast
from bench.difference import row_error
from erniem_fast import ErnieMConfig, ErnieMModel, host_layout, ops, reference, use_graphs
from erniem_fast.dropout import Dropout
from erniem_fast.flags import use_implementations, use_kernels
from erniem_fast.graphs import Graphs, Recorder
from erniem_fast.inference_gpu import GPU_LINEARS, Int8GpuLinear, gpu_objection, project_as_one
from erniem_fast.inputs import prepare
from erniem_fast.kernels import add_norm, bias_gelu
from erniem_fast.native.build import build
from erniem_fast.ops import Product
from erniem_fast.ops.triton import on_device
from erniem_fast.reference import Norm
from tests import ROOT
from tests.batches import dropout_of, sequences, two_sequences
from tests.kernels.comparison import assert_equivalent, run
from tests.model.test_host_layout import assert_same
from tests.model.tiny import relative_error
from tests.reruns import Reruns

EPS = 1e-5
HARD_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 0, 127, 128, 129, 257, 512)
HALF = torch.bfloat16
KERNELS = {"attention": "triton", "bias_gelu": "triton", "add_norm": "triton"}


@pytest.fixture
def sized(device):
    """A function that takes the size for a GPU and the one for the interpreter."""
    return lambda on_gpu, interpreted: on_gpu if device.type == "cuda" else interpreted


@pytest.fixture
def seed(device):
    return torch.tensor([0x123456789ABCDEF], device=device)


def attention(batch, heads, p, seed, qkv):
    with use_kernels(attention="triton"):
        return ops.attention(qkv, batch, heads, (qkv.shape[1] // (3 * heads)) ** -0.5, dropout_of(batch, p, seed))


def attention_reference(batch, heads, p, seed, qkv):
    scale = (qkv.shape[1] // (3 * heads)) ** -0.5
    return reference.attention(qkv, batch.sequences, heads, scale, dropout_of(batch, p, seed))


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (2, 32), (2, 128)])
def test_attention_of_hard_lengths(device, sized, seed, heads, head_dim, dropout, poisoned_memory):
    batch = sequences(*sized(HARD_LENGTHS, (1, 17, 0, 65)), device=device)
    heads, p_and_seed = sized(heads, 2), (0.1, seed if dropout else None)
    qkv = torch.randn(batch.tokens, 3 * heads * head_dim, device=device).to(HALF)
    kernel, oracle = (partial(op, batch, heads, *p_and_seed) for op in (attention, attention_reference))
    assert_equivalent(kernel, oracle, [qkv])


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("longest", [32, 64])
def test_attention_where_a_tile_holds_a_sequence(device, sized, seed, longest, dropout, poisoned_memory):
    batch = sequences(longest, 1, 0, 17, *sized((longest - 1, 2, 16) * 100, ()), device=device)
    heads, p_and_seed = sized(12, 2), (0.1, seed if dropout else None)
    qkv = torch.randn(batch.tokens, 3 * heads * 64, device=device).to(HALF)
    kernel, oracle = (partial(op, batch, heads, *p_and_seed) for op in (attention, attention_reference))
    assert_equivalent(kernel, oracle, [qkv])


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_backward_of_attention_finds_the_forward_s_scores(device, head_dim, dtype):
    """It takes products of keys and queries where the forward took those of queries and keys.

    A token alone has the probability 1, and its value the gradient of the result, as far as the two scores are equal.
    They are sums of `head_dim` products in float32, whose rounding is bounded by so many units of the terms' size.
    """
    qkv = (30 * torch.randn(64, 3 * head_dim, device=device)).to(dtype)
    grad = torch.randn(64, head_dim, device=device).to(dtype)
    _, grad_qkv = run(partial(attention, sequences(*[1] * 64, device=device), 1, 0.0, None), [qkv], grad)
    query, key, _ = qkv.double().unflatten(1, (3, head_dim)).unbind(1)
    size = (query * key).abs().sum(1).max() * head_dim**-0.5
    bound = 2 * head_dim * 2.0**-24 * size + torch.finfo(dtype).eps
    assert (grad_qkv[:, 2 * head_dim :] - grad).abs().max() <= bound * grad.abs().max()


@pytest.mark.parametrize("hidden", [96, 768, 1024])
def test_add_norm_of_many_rows(device, sized, seed, hidden, poisoned_memory):
    batch = sequences(*sized([512] * 40, [7, 12]), device=device)
    dropout = batch.dropout(0.1, seed)
    rows = [torch.randn(batch.tokens, hidden, device=device).to(HALF) for _ in range(2)]
    vectors = [torch.randn(hidden, device=device).to(HALF) for _ in range(3)]

    def kernel(residual, x, bias, weight, norm_bias):
        with use_kernels(layernorm="triton"):
            return ops.add_norm(residual, Product(x, bias), Norm(weight, norm_bias, EPS), dropout)

    def oracle(residual, x, bias, weight, norm_bias):
        return reference.add_norm(residual, x, bias, Norm(weight, norm_bias, EPS), dropout)

    assert_equivalent(kernel, oracle, [*rows, *vectors])


@pytest.mark.parametrize("features", [96, 3072, 4096])
def test_bias_gelu_of_many_rows(device, sized, seed, features, poisoned_memory):
    batch = sequences(*sized([512] * 40, [7, 12]), device=device)
    dropout = batch.dropout(0.1, seed)
    inputs = [torch.randn(shape, device=device).to(HALF) for shape in ((batch.tokens, features), (features,))]

    def kernel(x, bias):
        with use_kernels(bias_gelu="triton"):
            return ops.bias_gelu(Product(x, bias), "gelu", dropout)

    def oracle(x, bias):
        return reference.bias_gelu(x, bias, "gelu", dropout)

    assert_equivalent(kernel, oracle, inputs)


TAIL = 64  # rows; a multiple of a tile's, so that they lie in theirs as they do in a tensor of their own


def tokens_beyond(elements, features):
    """How many tokens of so many features have more elements than that."""
    return TAIL * (elements // features // TAIL + 2)


@pytest.fixture
def huge(sized):
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of the GPU's memory are free")
    return sized(2**31, 2**14)


def test_add_norm_beyond_31_bits_of_index(device, seed, huge):
    """The last rows come out as they do alone."""
    hidden = 768
    tokens = tokens_beyond(huge, hidden)
    batch = two_sequences(tokens, device)
    residual, x = (torch.randn(tokens, hidden, device=device, dtype=HALF) for _ in range(2))
    bias, *norm = (torch.randn(hidden, device=device, dtype=HALF) for _ in range(3))
    norm = Norm(*norm, EPS)

    def rows(of):
        dropout = Dropout(0.1, seed, batch.columns[of], batch.sequences.sequence_ids[of])
        out, z = add_norm.forward(residual[of], x[of], bias, norm, dropout, save=True)
        grad_residual, grad_x, *_, grad_norm_bias = add_norm.backward(residual[of], z, norm, dropout)
        return grad_norm_bias, (out, z, grad_residual, grad_x)

    grad_norm_bias, whole = rows(slice(None))
    _, alone = rows(slice(-TAIL, None))
    assert all(torch.equal(one[-TAIL:], other) for one, other in zip(whole, alone, strict=True))
    exact, size = (
        sum(part.sum(0, dtype=torch.float64) for part in each.split(2**16)) for each in (residual, residual.abs())
    )
    assert ((grad_norm_bias - exact).abs() / size).max() < 1e-6


def test_bias_gelu_beyond_31_bits_of_index(device, seed, huge):
    features = 3072
    tokens = tokens_beyond(huge, features)
    batch = two_sequences(tokens, device)
    x, bias = (torch.randn(shape, device=device, dtype=HALF) for shape in ((tokens, features), (features,)))

    def rows(of):
        dropout = Dropout(0.1, seed, batch.columns[of], batch.sequences.sequence_ids[of])
        out = bias_gelu.forward(x[of], bias, "gelu", dropout)
        return out, bias_gelu.backward(x[of], x[of], bias, "gelu", dropout)[0]

    whole, alone = rows(slice(None)), rows(slice(-TAIL, None))
    assert all(torch.equal(one[-TAIL:], other) for one, other in zip(whole, alone, strict=True))


def test_attention_beyond_31_bits_of_index(device, sized, huge):
    heads, length = sized(12, 2), sized(512, 70)
    rows = huge // (3 * heads * 64) // length + 2
    qkv = torch.randn(rows * length, 3 * heads * 64, device=device, dtype=HALF)
    grad = torch.randn(rows * length, heads * 64, device=device, dtype=HALF)
    whole = run(partial(attention, sequences(*[length] * rows, device=device), heads, 0.0, None), [qkv], grad)
    alone = run(partial(attention, sequences(length, device=device), heads, 0.0, None), [qkv[-length:]], grad[-length:])
    assert all(torch.equal(one[-length:], other) for one, other in zip(whole, alone, strict=True))


def model_of(device, dtype, **settings):
    """One layer of the base model, and few words; small where it is interpreted."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    if device.type == "cpu":
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    torch.manual_seed(0)
    return ErnieMModel(ErnieMConfig(vocab_size=1000, num_hidden_layers=1, **sizes, **settings)).to(device, dtype)


def rows_of(lengths, device):
    """Random ids, padded on the right, and their mask."""
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    return torch.randint(3, 1000, mask.shape, device=device), mask.long()


def train(model, ids, mask, embeddings, kernels=KERNELS):
    """The hidden states of a seeded forward, then the gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    with use_implementations(embeddings=embeddings, **kernels):
        hidden = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        (hidden * torch.linspace(-1, 1, hidden.numel(), device=ids.device).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def test_the_model_is_as_exact_as_the_reference(device, sized, packed):
    """With dropout on: the seeds are the same in every dtype."""
    ids, mask = rows_of(sized(HARD_LENGTHS[:8] + HARD_LENGTHS[9:], (1, 17, 30)), device)
    model = model_of(device, HALF).train()
    reference_kernels = dict.fromkeys(KERNELS, "reference")
    kernels = train(model, ids, mask, "torch")
    same = train(model, ids, mask, "reference", reference_kernels)
    exact = train(copy.deepcopy(model).double(), ids, mask, "reference", reference_kernels)
    largest = max(grad.abs().max() for grad in exact[1:])
    for one, other, truth in zip(kernels, same, exact, strict=True):
        # Keys' biases have no gradient but rounding: it is judged by the size of the others.
        slack = 8 * torch.finfo(HALF).eps * max(truth.abs().max(), 1e-3 * largest)
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + slack


@pytest.mark.parametrize("embeddings", ["triton", "native"])
def test_repeats_are_equal_to_the_bit(device, sized, embeddings):
    ids, mask = rows_of(sized(HARD_LENGTHS[-5:] * 4, (3, 20)), device)
    model = model_of(device, HALF).train()
    first = train(model, ids, mask, embeddings)
    assert all(each.isfinite().all() for each in first)
    for _ in range(sized(250, 2)):
        again = train(model, ids, mask, embeddings)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
def test_shapes_compile_nothing_new(monkeypatch):
    """Two kernels of each op; two more of attention's backward in two passes, two for up to 64, one for many.

    Which of these an architecture has is its own; each is compiled for the first batch of its kind.
    """
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, fn, **_: compiled.append(fn.name))
    device = torch.device("cuda")
    settings = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 320}  # no other test's
    model = ErnieMModel(ErnieMConfig(vocab_size=1000, num_hidden_layers=1, **settings)).to(device, HALF).train()

    def run(*batches):
        for lengths in batches:
            train(model, *rows_of(lengths, device), "torch")

    run([65], [512, 1, 100], [64], [129] * 200)
    assert 6 <= len(compiled) <= 11, compiled
    before = len(compiled)
    run([128] * 3, [129, 128, 64, 1, 1], [512] * 33, [1], [17, 3], [130] * 300)
    assert compiled[before:] == []


def test_a_forward_is_captured_in_a_graph(device, monkeypatch):
    """One batch of ids records it, another one replays it; in the padded layout, which waits for nothing."""
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "0")
    model = model_of(device, HALF).eval()
    (ids, mask), (others, _) = rows_of((32, 7), device), rows_of((32, 7), device)
    with use_implementations(**KERNELS), torch.inference_mode():
        expected = model(others, attention_mask=mask).last_hidden_state
        out, replay = captured(lambda: model(ids, attention_mask=mask).last_hidden_state, device)
        assert not torch.equal(out, expected)
        ids.copy_(others)
        assert torch.equal(replay(), expected)


def test_graphs_by_bucket(device):
    """Of batches in the same and in other buckets, on two streams in turn; the products of a bucket round otherwise."""
    model = model_of(device, HALF).eval()
    model._graphs = Graphs(model, 64, Recorder if device.type == "cuda" else Reruns)
    batches = [rows_of(lengths, device) for lengths in ((9,), (16,), (5, 9, 2), (7, 7), (3, 8, 1), (40, 24), (9,))]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()] if device.type == "cuda" else [None, None]
    if device.type == "cuda":
        torch.cuda.synchronize()
    with use_implementations(**KERNELS), torch.inference_mode():
        results = []
        for index, (ids, mask) in enumerate(batches):
            with torch.cuda.stream(streams[index % 2]):
                results.append(model(ids, attention_mask=mask))
        if device.type == "cuda":
            torch.cuda.synchronize()
        model._graphs = None
        for (ids, mask), result in zip(batches, results, strict=True):
            expected = model(ids, attention_mask=mask)
            for name in ("last_hidden_state", "pooler_output"):
                assert relative_error(result[name], expected[name]) <= 4 * torch.finfo(HALF).eps


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(9,), (5, 9, 2), (7, 7)])
def test_few_tokens_are_laid_out_on_the_host(lengths, monkeypatch):
    """The same tensors as of a layout that is made on the GPU, in one piece of memory; positions may be on the host."""
    device = torch.device("cuda")
    config, (ids, mask) = ErnieMConfig(), rows_of(lengths, device)
    positions = torch.arange(ids.shape[1])[None]

    def lay_out():
        return prepare(config, ids, None, mask, positions, None, None, needs_first=True, vocabulary=1000)

    moved = lay_out()
    assert moved.positions.untyped_storage().data_ptr() == moved.input_ids.untyped_storage().data_ptr()
    monkeypatch.setattr(host_layout, "_MOST_ELEMENTS", 0)
    assert_same(moved, lay_out())


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_kernel_that_ran_before_serves_only_what_it_was_compiled_for(device, dtype):
    """Calls with and without a bias in turn, and of a tensor that starts at no multiple of 16 bytes."""
    memory, bias = torch.randn(64 * 96 + 1, device=device).to(dtype), torch.randn(96, device=device).to(dtype)
    aligned, shifted = memory[:-1].view(64, 96), memory[1:].view(64, 96)
    with on_device(device):
        for _ in range(2):
            for x, added in product((aligned, shifted, aligned[:5]), (bias, None)):
                exact = reference.bias_gelu(x.double(), None if added is None else added.double(), "gelu")
                found = bias_gelu.forward(x, added, "gelu", None)
                assert row_error(found, exact) <= 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_use_graphs_follows_the_weights():
    device = torch.device("cuda")
    model = model_of(device, HALF).eval()
    ids, mask = rows_of((9, 4), device)
    use_graphs(model)
    with torch.no_grad():
        first = model(ids, attention_mask=mask).pooler_output
        assert torch.equal(model(ids, attention_mask=mask).pooler_output, first)
        model.pooler.dense.bias.add_(1)
        changed = model(ids, attention_mask=mask).pooler_output
        assert (changed > first).all()
        model.pooler.dense.bias = torch.nn.Parameter(model.pooler.dense.bias - 1)
        assert relative_error(model(ids, attention_mask=mask).pooler_output, first) <= 4 * torch.finfo(HALF).eps


def captured(forward, device):
    """The result of `forward`, and a function that computes it again: on a GPU, from a graph."""
    if device.type == "cpu":
        return forward(), forward
    for _ in range(2):
        forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()

    def replay():
        graph.replay()
        return out

    return replay().clone(), replay


# --- 8-bit weights ----------------------------------------------------------------------------------------------------

every_form = pytest.mark.parametrize("weights", GPU_LINEARS)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
CUDA = torch.device("cuda")
# The largest error of a row against the exact product of what is rounded, in root mean squares: the rounding of the
# result, and in float8 that of the sums, which a Hopper adds up in fewer digits than float32 has: at most 0.015 on an
# H100.
LARGEST_ERROR = {"int8": 0.0, "float8": 0.02}


@pytest.fixture
def served(weights):
    """Skips a form of weights that this GPU does not multiply."""
    reason = gpu_objection(weights, CUDA)
    if reason is not None:
        pytest.skip(reason)


def linear_of(inputs, outputs, dtype, bias=True):
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).eval().to(CUDA, dtype)


@pytest.mark.gpu
@every_form
@every_half
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 768), (768, 3072), (3072, 768), (64, 48), (1024, 4096)])
def test_8_bit_linears_beside_the_exact_product(served, weights, dtype, inputs, outputs, bias):
    scaled = GPU_LINEARS[weights].of(linear_of(inputs, outputs, dtype, bias))
    for tokens in (0, 1, 2, 15, 16, 17, 33, 250, 4096):
        x = torch.randn(tokens, inputs, device=CUDA).to(dtype)
        result = scaled(x)
        assert (result.dtype, result.shape) == (dtype, (tokens, outputs))
        if tokens:
            exact = reference.scaled_linear(x, *scaled.operands())
            assert row_error(result, exact) <= LARGEST_ERROR[weights] + torch.finfo(dtype).eps


@pytest.mark.gpu
@every_form
def test_8_bit_linears_of_odd_rows(served, weights):
    scaled, x = GPU_LINEARS[weights].of(linear_of(768, 64, HALF)), torch.randn(40, 768, device=CUDA).to(HALF)
    x[3], x[5], x[6], x[7, 2], x[8] = torch.nan, torch.inf, 0.0, -torch.inf, 3e38
    result = scaled(x)
    assert result[[3, 5, 7]].isnan().all()
    assert torch.equal(result[6], scaled.bias)
    others = [row for row in range(40) if row not in (3, 5, 7)]
    assert not result[others].isnan().any()


@pytest.mark.gpu
@every_form
def test_8_bit_queries_keys_and_values_are_those_of_their_linears(served, weights):
    linears = [GPU_LINEARS[weights].of(linear_of(768, 768, HALF)) for _ in range(3)]
    x = torch.randn(300, 768, device=CUDA).to(HALF)
    one, three = project_as_one(linears, x), torch.cat([linear(x) for linear in linears], dim=1)
    assert row_error(one, three) <= LARGEST_ERROR[weights]


@pytest.mark.gpu
def test_int8_of_a_token_has_the_same_bits_alone_and_among_others():
    scaled, x = Int8GpuLinear.of(linear_of(768, 3072, HALF)), torch.randn(1000, 768, device=CUDA).to(HALF)
    whole = scaled(x)
    for tokens in (1, 2, 16, 17, 64, 513):
        assert torch.equal(scaled(x[-tokens:]), whole[-tokens:])


@torch.inference_mode()
def hidden_of(model, ids, mask):
    return model(ids, attention_mask=mask).last_hidden_state


@pytest.mark.gpu
@every_form
@every_half
def test_8_bit_models_are_near_those_in_16_bits(served, weights, dtype):
    ids, mask = rows_of((1, 17, 128, 300, 512), CUDA)
    model = model_of(CUDA, dtype).eval()
    exact = hidden_of(model, ids, mask)[mask.bool()].float()
    bits = {name: each.clone() for name, each in model.state_dict().items()}
    erniem_fast.optimize(model, weights, keep=True)
    result = hidden_of(model, ids, mask)
    assert result.dtype == dtype
    assert torch.cosine_similarity(result[mask.bool()].float(), exact, dim=-1).min() > 0.99
    assert torch.equal(hidden_of(model, ids, mask), result)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIEM_FAST_KERNELS", "off")
        plain = hidden_of(model, ids, mask)[mask.bool()].float()
    assert torch.cosine_similarity(plain, exact, dim=-1).min() > 0.99
    with pytest.raises(RuntimeError, match=rf"{weights} weights stays in {str(dtype)[6:]} on cuda:0"):
        model.float()
    model.to(CUDA, dtype)
    assert torch.equal(hidden_of(model, ids, mask), result)
    erniem_fast.restore(model)
    assert all(torch.equal(each, bits[name]) for name, each in model.state_dict().items())


@pytest.mark.gpu
def test_int8_models_have_the_same_bits_alone_and_in_a_batch():
    """Of one layer, on kernels whose tiles do not depend on the batch: sequences as long as the longest."""
    ids, mask = rows_of((300,) * 7, CUDA)
    model = erniem_fast.optimize(model_of(CUDA, HALF).eval(), "int8", keep=True)
    together = hidden_of(model, ids, mask)
    for row in (0, 6):
        assert torch.equal(hidden_of(model, ids[row : row + 1], mask[row : row + 1])[0], together[row])


@pytest.mark.gpu
@every_form
def test_8_bit_models_replay_graphs(served, weights):
    model = erniem_fast.optimize(model_of(CUDA, HALF).eval(), weights, keep=True)
    (ids, mask), (others, its_mask) = rows_of((9, 4), CUDA), rows_of((40, 24, 3), CUDA)
    expected = [hidden_of(model, *batch) for batch in ((ids, mask), (others, its_mask))]
    use_graphs(model)
    for _ in range(2):
        for batch, without in zip(((ids, mask), (others, its_mask)), expected, strict=True):
            assert relative_error(hidden_of(model, *batch), without) <= 0.05


@pytest.mark.gpu
@every_form
def test_8_bit_weights_take_models_in_16_bits(served, weights):
    with pytest.raises(
        ValueError, match=rf"weights='{weights}' needs a model in bfloat16 or float16 on cuda:0.*float32"
    ):
        erniem_fast.optimize(model_of(CUDA, torch.float32).eval(), weights)


def test_bad_ids_are_named_and_do_no_harm(device, packed):
    """The error comes before any table is read, and what runs next runs."""
    model = model_of(device, HALF).eval()
    ids, mask = rows_of((9, 4), device)
    with use_implementations(embeddings="native", **KERNELS), torch.inference_mode():
        before = model(ids, attention_mask=mask).last_hidden_state
        bad = ids.clone()
        bad[1, 2] = 1000
        with pytest.raises(ValueError, match=r"input_ids\[1, 2\] is 1000, outside \[0, 1000\)"):
            model(bad, attention_mask=mask)
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, before)


STEP = """
import sys
import torch
sys.path.insert(0, {root!r})
from tests.test_gpu import model_of, rows_of, train
device = torch.device({device!r})
results = train(model_of(device, torch.float16).train(), *rows_of((33, 5, 70), device), "native")
assert all(each.isfinite().all() for each in results)
"""


def test_the_sanitizer_finds_no_stray_access(device):
    """In a training step on all kernels, where every tensor is an allocation of its own."""
    sanitizer = []
    if device.type == "cuda":
        if shutil.which("compute-sanitizer") is None:
            pytest.skip("there is no compute-sanitizer; it comes with the CUDA toolkit")
        sanitizer = ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=9"]
    build([device.type])
    code = STEP.format(root=str(ROOT), device=device.type)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*sanitizer, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
