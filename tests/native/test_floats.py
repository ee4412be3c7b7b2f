"""Products with packed weights in bfloat16 and float32, alone and in layers; those of integers are in test_int8.py."""

import pytest
import torch

from erniem_fast.native import library
from erniem_fast.native import packed as products
from tests.native.float_linears import DTYPES, KERNELS, SIZES, is_exact, is_nan_kept_apart, layer_linears
from tests.native.int8_layers import BATCHES, HEADS, NORMS, SCALE, is_its_ops

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library is not built")
every_kernel = pytest.mark.parametrize(("dtype", "kernel"), KERNELS)


def test_kernels_are_those_of_the_processor():
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = {"AVX512": ["avx2_float", "avx512_float"], "AVX2": ["avx2_float"]}.get(capability, [])
    assert products.kernels(torch.float32) == vectors
    found = products.kernels(torch.bfloat16)
    assert ("avx512_bf16" in found) == (capability == "AVX512" and torch.cpu._is_avx512_bf16_supported())
    assert ("amx_bf16" in found) == (capability == "AVX512" and torch.cpu._is_amx_tile_supported())


@every_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_are_those_of_float32(dtype, kernel, sizes, bias):
    assert is_exact(dtype, kernel, sizes, bias)


@every_kernel
def test_a_token_with_nan_disturbs_no_other(dtype, kernel):
    assert is_nan_kept_apart(dtype, kernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (33, 3), (32, 96), (7, 1031)])
def test_a_packed_weight_can_be_unpacked(dtype, out_features, in_features):
    weight = torch.randn(out_features, in_features).to(dtype)
    assert torch.equal(products.unpack(products.pack(weight), out_features, in_features, dtype), weight)


@every_kernel
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_layer_has_the_bits_of_its_ops(dtype, kernel, batch):
    assert is_its_ops(batch, kernel=kernel, linears=layer_linears(dtype))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if products.multiplies(dtype)])
def test_a_layer_of_two_kinds_is_refused(dtype):
    other = products.PackedLinear(torch.zeros(1, dtype=torch.uint8), torch.ones(24), None, torch.int8)
    with pytest.raises(ValueError, match="k_packed has shape"):
        products.layer_parameters({**layer_linears(dtype), "k": other}, NORMS, HEADS, SCALE, "gelu")
