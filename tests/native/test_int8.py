"""Products of 8-bit integers, alone and in a layer: the reference's very bits, by every kernel of this processor."""

import pytest
import torch

from erniem_fast import ops
from erniem_fast.batch import TokenBatch
from erniem_fast.flags import use_implementations
from erniem_fast.native import int8, library
from erniem_fast.ops import Product
from erniem_fast.reference import Norm, quantise_tokens, quantise_weight, quantised_linear
from erniem_fast.verify import battery
from tests.mutation import holds

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")

every_kernel = pytest.mark.parametrize("kernel", int8.kernels() if library.is_built("cpu") else ())


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs a test by so many threads: where blocks of tokens begin depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The integers, scales and bias of a linear from 99 features to 70."""
    generator = torch.Generator().manual_seed(1)
    return *quantise_weight(torch.randn(70, 99, generator=generator)), torch.randn(70, generator=generator)


def test_kernels_are_those_of_the_capability():
    kernels, capability = int8.kernels(), torch.backends.cpu.get_cpu_capability()
    assert kernels["plain"] == 255
    assert ("avx2" in kernels) == (capability in ("AVX2", "AVX512"))
    assert ("avx512" in kernels) == (capability == "AVX512")
    assert ("avx512_vnni" in kernels) == (capability == "AVX512" and torch.cpu._is_vnni_supported())
    assert {levels for name, levels in kernels.items() if name in ("avx2", "avx512")} <= {127}
    assert int8.levels() == list(kernels.values())[-1]


@every_kernel
def test_bits_of_the_reference(kernel, threads):
    checks = [check for check in battery.battery(torch.device("cpu")) if getattr(check, "kernel", None) == kernel]
    assert len(checks) == len(battery._INT8)
    assert [check for check in checks if not holds(check)] == []


@every_kernel
def test_largest_integers(kernel):
    """Sums of as many products as the kernels allow, all of the largest integers: nothing overflows."""
    levels, features = int8.kernels()[kernel], int8.MOST_FEATURES
    x = torch.tensor([[1.0], [-1.0]]).repeat(1, features)
    weight = torch.tensor([[127], [-127], [1]], dtype=torch.int8).repeat(1, features)
    result = int8.linear(x, int8.pack(weight), torch.ones(3), None, kernel=kernel)
    scale = quantise_tokens(x, levels).scale
    sums = torch.tensor([[127, -127, 1], [-127, 127, -1]]) * levels * features
    assert torch.equal(result, sums.float() * scale)


def test_more_features_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 66312\), but sums of more than 66311 products can overflow"):
        int8.pack(torch.zeros(1, int8.MOST_FEATURES + 1, dtype=torch.int8))


@every_kernel
def test_a_token_does_not_depend_on_others(kernel, threads, weight):
    values, scale, bias = weight
    x, packed = torch.randn(200, 99), int8.pack(values)
    together = int8.linear(x, packed, scale, bias, kernel=kernel)
    x[100] = torch.nan
    x[50, 7] = torch.inf
    beside = int8.linear(x, packed, scale, bias, kernel=kernel)
    assert beside[[50, 100]].isnan().all()
    for token in (0, 1, 13, 49, 51, 99, 101, 150, 199):
        alone = int8.linear(x[token : token + 1], packed, scale, bias, kernel=kernel)
        assert torch.equal(alone[0], together[token])
        assert torch.equal(beside[token], together[token])


def test_inputs_need_not_be_contiguous(weight):
    values, scale, bias = weight
    x = torch.randn(99, 20).t()
    expected = quantised_linear(x, values, scale, bias, int8.levels())
    assert torch.equal(int8.linear(x, int8.pack(values.t().contiguous().t()), scale, bias), expected)


def test_a_kernel_that_the_processor_lacks_is_refused(weight, monkeypatch):
    values, scale, bias = weight
    monkeypatch.setitem(int8.KERNELS, "another", 99)
    with pytest.raises(RuntimeError, match="lacks the kernel"):
        int8.linear(torch.randn(2, 99), int8.pack(values), scale, bias, kernel="another")


def test_a_weight_of_another_size_is_refused(weight):
    values, scale, bias = weight
    with pytest.raises(ValueError, match="packed has shape"):
        int8.linear(torch.randn(2, 99), int8.pack(values[:, :50]), scale, bias)


# ---- The whole layer

SIZES = {"q": (24, 40), "k": (24, 40), "v": (24, 40), "out": (40, 24), "up": (97, 40), "down": (40, 97)}
HEADS, SCALE = 3, 8**-0.5
NATIVE = {"attention": "native", "bias_gelu": "native", "add_norm": "native"}


@pytest.fixture(scope="module")
def parameters() -> tuple[dict[str, int8.PackedLinear], dict[str, Norm]]:
    """The linears and norms of a layer that was pruned to three heads; half of its linears have no bias."""
    generator = torch.Generator().manual_seed(2)
    linears, norms = {}, {}
    for name, shape in SIZES.items():
        values, scale = quantise_weight(torch.randn(shape, generator=generator))
        bias = None if name in ("k", "out", "up") else torch.randn(shape[0], generator=generator)
        linears[name] = int8.PackedLinear(int8.pack(values), scale, bias)
    for name in ("norm1", "norm2"):
        norms[name] = Norm(torch.randn(40, generator=generator), torch.randn(40, generator=generator), 0.1)
    return linears, norms


def one_by_one(x, batch, linears, norms, activation, kernel):
    """The layer by one call for each product and op."""

    def multiply(name, x):
        return int8.linear(x, *linears[name], kernel=kernel)

    with use_implementations(**NATIVE):
        qkv = torch.cat([multiply(name, x) for name in "qkv"], dim=1)
        context = ops.attention(qkv, batch, HEADS, SCALE)
        attended = ops.add_norm(x, Product(multiply("out", context)), norms["norm1"])
        activated = ops.bias_gelu(Product(multiply("up", attended)), activation)
        return ops.add_norm(attended, Product(multiply("down", activated)), norms["norm2"])


LAYOUTS = {
    "one token": [1],
    "two sequences": [3, 5],
    "a sequence without tokens": [7, 0, 20],
    "blocks": [100, 31, 2, 64],
    "no tokens": [0, 0],
}


def packed(lengths: list[int]) -> TokenBatch:
    return TokenBatch.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), max(lengths), sum(lengths))


@every_kernel
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layer_has_the_bits_of_its_ops(kernel, lengths, threads, parameters):
    batch, x = packed(lengths), torch.randn(sum(lengths), 40)
    result = int8.layer(x, batch.sequences, *parameters, HEADS, SCALE, "gelu", kernel)
    assert torch.equal(result, one_by_one(x, batch, *parameters, "gelu", kernel))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_a_layer_with_a_mask(activation, parameters):
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1, 7:], mask[2, ::3] = False, False
    batch, x = TokenBatch.padded((3, 30), torch.device("cpu"), mask), torch.randn(90, 40)
    result = int8.layer(x, batch.sequences, *parameters, HEADS, SCALE, activation)
    assert torch.equal(result, one_by_one(x, batch, *parameters, activation, None))


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(parameters):
    lengths = [100, 24, 1, 60]
    x = torch.randn(sum(lengths), 40)

    def run(x, batch):
        return int8.layer(x, batch.sequences, *parameters, HEADS, SCALE, "gelu")

    together = run(x, packed(lengths)).split(lengths)
    for part, expected in zip(x.split(lengths), together, strict=True):
        assert torch.equal(run(part, packed([len(part)])), expected)
    order = [2, 0, 3, 1]
    reordered = run(torch.cat([x.split(lengths)[i] for i in order]), packed([lengths[i] for i in order]))
    assert torch.equal(reordered, torch.cat([together[i] for i in order]))


def test_a_layer_in_padding_has_the_bits_of_the_packed_one(parameters):
    lengths, width = [40, 13, 29], 41
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths) * width, 40)
    padded = TokenBatch.padded((len(lengths), width), torch.device("cpu"), mask)
    result = int8.layer(x, padded.sequences, *parameters, HEADS, SCALE, "gelu")[mask.flatten()]
    expected = int8.layer(x[mask.flatten()], packed(lengths).sequences, *parameters, HEADS, SCALE, "gelu")
    assert torch.equal(result, expected)


def test_a_sequence_with_nan_disturbs_no_other(parameters):
    lengths = [5, 30, 8]
    x = torch.randn(sum(lengths), 40)
    expected = int8.layer(x, packed(lengths).sequences, *parameters, HEADS, SCALE, "gelu")
    x[7, 3] = torch.nan
    result = int8.layer(x, packed(lengths).sequences, *parameters, HEADS, SCALE, "gelu")
    assert result[5:35].isnan().all()
    assert torch.equal(result[:5], expected[:5])
    assert torch.equal(result[35:], expected[35:])


def test_a_layer_with_a_weight_of_another_size_is_refused(parameters):
    linears, norms = parameters
    x, batch = torch.randn(4, 40), packed([4])
    for name in linears:
        wrong = {**linears, name: linears[name]._replace(packed=linears[name].packed[128:])}
        with pytest.raises(ValueError, match=f"{name}_packed has shape"):
            int8.layer(x, batch.sequences, wrong, norms, HEADS, SCALE, "gelu")
