"""A small layer with products of 8-bit integers, as one native call and as one call for each product and op."""

import torch
from torch import Tensor

from erniem_fast import ops
from erniem_fast.batch import TokenBatch, key_bias_of
from erniem_fast.flags import use_implementations
from erniem_fast.native import packed as products
from erniem_fast.native.layer import Layers
from erniem_fast.ops import Product
from erniem_fast.reference import Norm, quantise_weight
from tests.batches import ranged

CPU = torch.device("cpu")
HIDDEN, HEADS, SCALE = 40, 3, 8**-0.5
NATIVE = {"attention": "native", "bias_gelu": "native", "add_norm": "native"}

_GENERATOR = torch.Generator().manual_seed(2)
SHAPES = {"q": (24, 40), "k": (24, 40), "v": (24, 40), "out": (40, 24), "up": (97, 40), "down": (40, 97)}


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


def _linear(out_features: int, in_features: int, bias: bool) -> products.PackedLinear:
    values, scale = quantise_weight(_randn(out_features, in_features))
    return products.PackedLinear(products.pack(values), scale, _randn(out_features) if bias else None, torch.int8)


LINEARS = {name: _linear(*shape, bias=name not in ("k", "out", "up")) for name, shape in SHAPES.items()}
NORMS = {name: Norm(_randn(HIDDEN), _randn(HIDDEN), eps) for name, eps in (("norm1", 0.1), ("norm2", 0.2))}


def packed(*lengths: int) -> TokenBatch:
    return TokenBatch.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), max(lengths), sum(lengths))


def padded(mask: Tensor) -> TokenBatch:
    return TokenBatch.padded(tuple(mask.shape), CPU, key_bias_of(mask))


def _mask() -> Tensor:
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1, 7:], mask[2, ::3] = False, False
    return mask


BATCHES = {
    "one token": packed(1),
    "two sequences": packed(3, 5),
    "a sequence without tokens": packed(7, 0, 20),
    "blocks of tokens": packed(100, 31, 2, 64),
    "padded, with a mask": padded(_mask()),
    "with key ranges": ranged(40, 3),
    "no tokens": packed(0, 0),
}


def whole(
    x: Tensor,
    batch: TokenBatch,
    linears: dict[str, products.PackedLinear] = LINEARS,
    activation: str = "gelu",
    kernel: str | None = None,
) -> Tensor:
    """The layer by one call."""
    parameters = products.layer_parameters(linears, NORMS, HEADS, SCALE, activation, kernel)
    return Layers([parameters], products.LAYERS)(x, batch.sequences)


def one_by_one(
    x: Tensor,
    batch: TokenBatch,
    linears: dict[str, products.PackedLinear],
    activation: str = "gelu",
    kernel: str | None = None,
) -> Tensor:
    """The layer by one call for each product and op."""

    def multiply(name: str, x: Tensor) -> Tensor:
        return products.linear(x, *linears[name], kernel=kernel)

    with use_implementations(**NATIVE):
        qkv = torch.cat([multiply(name, x) for name in "qkv"], dim=1)
        context = ops.attention(qkv.to(products.attention_dtype(linears["q"].dtype)), batch, HEADS, SCALE).float()
        attended = ops.add_norm(x, Product(multiply("out", context)), NORMS["norm1"])
        activated = ops.bias_gelu(Product(multiply("up", attended)), activation)
        return ops.add_norm(attended, Product(multiply("down", activated)), NORMS["norm2"])


def is_its_ops(
    batch: TokenBatch,
    activation: str = "gelu",
    kernel: str | None = None,
    linears: dict[str, products.PackedLinear] = LINEARS,
) -> bool:
    """Whether both have the same bits."""
    x, rest = _randn(batch.tokens, HIDDEN), (batch, linears, activation, kernel)
    return torch.equal(whole(x, *rest), one_by_one(x, *rest))


def are_one_after_another() -> bool:
    """Whether one call of three different layers gives what three calls give, one for each layer."""
    batch = BATCHES["two sequences"]
    first = products.layer_parameters(LINEARS, NORMS, HEADS, SCALE, "gelu")
    norms = {"norm1": NORMS["norm2"], "norm2": NORMS["norm1"]}
    narrow = {
        **LINEARS,
        **{name: _linear(8, HIDDEN, bias=True) for name in "qkv"},
        "out": _linear(HIDDEN, 8, bias=True),
    }
    layers = [first, products.layer_parameters(narrow, norms, 1, SCALE, "relu"), first]
    x = _randn(batch.tokens, HIDDEN)
    together, given = Layers(layers, products.LAYERS)(x, batch.sequences), x.clone()
    for each in layers:
        x = Layers([each], products.LAYERS)(x, batch.sequences)
    return torch.equal(together, x) and not torch.equal(x, given)
