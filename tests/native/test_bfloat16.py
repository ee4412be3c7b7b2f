"""Products with weights in bfloat16, alone and in layers; those of integers are in test_int8.py."""

import pytest
import torch

from erniem_fast.flags import use_implementations
from erniem_fast.native import packed as products
from erniem_fast.native.layer import Layers
from tests.native.bfloat16_linears import SIZES, is_exact, is_nan_kept_apart
from tests.native.int8_layers import BATCHES, HEADS, HIDDEN, NATIVE, NORMS, SCALE, SHAPES, one_by_one

pytestmark = pytest.mark.skipif(not products.multiplies_bfloat16(), reason="the CPU or the library has no such product")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_are_those_of_float32(sizes, bias):
    assert is_exact(*sizes, bias=bias)


def test_a_token_with_nan_disturbs_no_other():
    assert is_nan_kept_apart()


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (33, 3), (32, 96), (7, 1031)])
def test_a_packed_weight_can_be_unpacked(out_features, in_features):
    weight = torch.randn(out_features, in_features).bfloat16()
    assert torch.equal(products.unpack(products.pack(weight), out_features, in_features, torch.bfloat16), weight)


def linears() -> dict[str, products.PackedLinear]:
    def linear(out_features: int, in_features: int) -> products.PackedLinear:
        weight = torch.randn(out_features, in_features).bfloat16()
        return products.PackedLinear(products.pack(weight), None, torch.randn(out_features))

    return {name: linear(*shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_layer_has_the_bits_of_its_ops(batch):
    layer, x = linears(), torch.randn(batch.tokens, HIDDEN)
    parameters = products.layer_parameters(layer, NORMS, HEADS, SCALE, "gelu")
    with use_implementations(**NATIVE):
        assert torch.equal(Layers([parameters], products.LAYERS)(x, batch.sequences), one_by_one(x, batch, layer))


def test_a_layer_of_both_kinds_is_refused():
    mixed = {**linears(), "k": products.PackedLinear(torch.zeros(1, dtype=torch.uint8), torch.ones(24), None)}
    with pytest.raises(ValueError, match="k_packed has shape"):
        products.layer_parameters(mixed, NORMS, HEADS, SCALE, "gelu")
