"""Products of 8-bit integers, alone and in a layer: the reference's very bits, by every kernel of this processor."""

import pytest
import torch

from erniem_fast.native import library
from erniem_fast.native import packed as products
from erniem_fast.reference import quantise_tokens, quantise_weight, quantised_linear
from erniem_fast.verification import battery
from tests.mutation import holds
from tests.native.int8_layers import (
    BATCHES,
    HEADS,
    HIDDEN,
    LINEARS,
    NORMS,
    SCALE,
    are_one_after_another,
    is_its_ops,
    packed,
    padded,
    whole,
)

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")

every_kernel = pytest.mark.parametrize("kernel", products.kernels(torch.int8) if library.is_built("cpu") else ())


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
    kernels, capability = products.kernels(torch.int8), torch.backends.cpu.get_cpu_capability()
    wide = capability == "AVX512"
    assert ("avx2" in kernels) == (capability in ("AVX2", "AVX512"))
    assert ("avx512" in kernels) == wide
    assert ("avx512_vnni" in kernels) == (wide and torch.cpu._is_vnni_supported())
    assert ("amx_int8" in kernels) == (wide and torch.cpu._is_amx_tile_supported())
    narrow = {name for name in kernels if products.levels(name) == 127}
    assert narrow == {"avx2", "avx512"} & set(kernels)
    assert {products.levels(name) for name in set(kernels) - narrow} == {255}
    assert products.levels() == products.levels(kernels[-1])


@every_kernel
def test_bits_of_the_reference(kernel, threads):
    checks = [check for check in battery.battery(torch.device("cpu")) if getattr(check, "kernel", None) == kernel]
    assert len(checks) == len(battery._INT8)
    assert [check for check in checks if not holds(check)] == []


@every_kernel
def test_largest_integers(kernel):
    """Sums of as many products as the kernels allow, all of the largest integers: nothing overflows."""
    levels, features = products.levels(kernel), products.MOST_FEATURES
    x = torch.tensor([[1.0], [-1.0]]).repeat(1, features)
    weight = torch.tensor([[127], [-127], [1]], dtype=torch.int8).repeat(1, features)
    result = products.linear(x, products.pack(weight), torch.ones(3), None, torch.int8, kernel=kernel)
    scale = quantise_tokens(x, levels).scale
    sums = torch.tensor([[127, -127, 1], [-127, 127, -1]]) * levels * features
    assert torch.equal(result, sums.float() * scale)


def test_more_features_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 66312\), but sums of more than 66311 products can overflow"):
        products.pack(torch.zeros(1, products.MOST_FEATURES + 1, dtype=torch.int8))


@every_kernel
def test_a_token_does_not_depend_on_others(kernel, threads, weight):
    values, scale, bias = weight
    x, packed = torch.randn(200, 99), products.pack(values)
    together = products.linear(x, packed, scale, bias, torch.int8, kernel=kernel)
    x[100] = torch.nan
    x[50, 7] = torch.inf
    beside = products.linear(x, packed, scale, bias, torch.int8, kernel=kernel)
    assert beside[[50, 100]].isnan().all()
    for token in (0, 1, 13, 49, 51, 99, 101, 150, 199):
        alone = products.linear(x[token : token + 1], packed, scale, bias, torch.int8, kernel=kernel)
        assert torch.equal(alone[0], together[token])
        assert torch.equal(beside[token], together[token])


def test_inputs_need_not_be_contiguous(weight):
    values, scale, bias = weight
    x = torch.randn(99, 20).t()
    expected = quantised_linear(x, values, scale, bias, products.levels())
    assert torch.equal(
        products.linear(x, products.pack(values.t().contiguous().t()), scale, bias, torch.int8), expected
    )


def test_a_kernel_that_the_processor_lacks_is_refused(weight, monkeypatch):
    values, scale, bias = weight
    monkeypatch.setitem(products._NUMBERS, "another", 99)
    with pytest.raises(RuntimeError, match="lacks the kernel"):
        products.linear(torch.randn(2, 99), products.pack(values), scale, bias, torch.int8, kernel="another")


def test_a_weight_of_another_size_is_refused(weight):
    values, scale, bias = weight
    with pytest.raises(ValueError, match="packed has shape"):
        products.linear(torch.randn(2, 99), products.pack(values[:, :96]), scale, bias, torch.int8)


# ---- The whole layer


@every_kernel
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_layer_has_the_bits_of_its_ops(kernel, batch, threads):
    assert is_its_ops(batch, kernel=kernel)


def test_layers_one_after_another(threads):
    assert are_one_after_another()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations(activation):
    assert is_its_ops(BATCHES["two sequences"], activation)


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch():
    lengths = [100, 24, 1, 60]
    parts = torch.randn(sum(lengths), HIDDEN).split(lengths)
    together = whole(torch.cat(parts), packed(*lengths)).split(lengths)
    for part, expected in zip(parts, together, strict=True):
        assert torch.equal(whole(part, packed(len(part))), expected)
    order = [2, 0, 3, 1]
    reordered = whole(torch.cat([parts[i] for i in order]), packed(*(lengths[i] for i in order)))
    assert torch.equal(reordered, torch.cat([together[i] for i in order]))


def test_a_layer_in_padding_has_the_bits_of_the_packed_one():
    lengths, width = [40, 13, 29], 41
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    x, real = torch.randn(mask.numel(), HIDDEN), mask.flatten()
    assert torch.equal(whole(x, padded(mask))[real], whole(x[real], packed(*lengths)))


def test_a_sequence_with_nan_disturbs_no_other():
    batch, x = packed(5, 30, 8), torch.randn(43, HIDDEN)
    expected = whole(x, batch)
    x[7, 3] = torch.nan
    result = whole(x, batch)
    assert result[5:35].isnan().all()
    assert torch.equal(result[:5], expected[:5])
    assert torch.equal(result[35:], expected[35:])


def test_a_layer_with_a_weight_of_another_size_is_refused():
    for name, linear in LINEARS.items():
        wrong = {**LINEARS, name: linear._replace(packed=linear.packed[128:])}
        with pytest.raises(ValueError, match=f"{name}_packed has shape"):
            products.layer_parameters(wrong, NORMS, HEADS, SCALE, "gelu")
