"""Products with packed weights in bfloat16 and float32, against the same numbers in float64."""

import torch

from erniem_fast.native import library
from erniem_fast.native import packed as products
from tests.native.int8_layers import SHAPES

# Tokens, features that come in and go out: odd numbers of all, a block and more, and more tokens than a tile has.
SIZES = [(1, 1, 1), (5, 3, 33), (13, 1031, 7), (30, 96, 32), (200, 70, 65), (33, 160, 40)]
DTYPES = (torch.bfloat16, torch.float32)
KERNELS = [
    (dtype, kernel) for dtype in DTYPES for kernel in (products.kernels(dtype) if library.is_built("cpu") else ())
]


def is_exact(dtype: torch.dtype, kernel: str, sizes: tuple[int, int, int], bias: bool = True) -> bool:
    """Whether a product's error is below what adding up in float32 can lose; memory beyond rows holds NaN."""
    tokens, in_features, out_features = sizes
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(tokens, in_features, generator=generator) * torch.logspace(-6, 6, tokens)[:, None]
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    added = torch.randn(out_features, generator=generator) if bias else None
    out = torch.full((tokens, out_features + 3), torch.nan)
    products.linear(x, products.pack(weight), None, added, dtype, out[:, 1:-2], kernel)
    rounded = x.to(dtype).double()
    exact = rounded @ weight.double().t() + (added.double() if bias else 0.0)
    magnitudes = rounded.abs() @ weight.double().abs().t() + (added.double().abs() if bias else 0.0)
    # Each addition rounds by half a unit of at most the sum of magnitudes; AMX adds pairs, and cuts off what is small.
    bound = (in_features + 2) * torch.finfo(torch.float32).eps * (1.0 if kernel == "amx_bf16" else 0.5) * magnitudes
    return bool(((out[:, 1:-2] - exact).abs() <= bound).all() and out[:, [0, -2, -1]].isnan().all())


def are_all_exact() -> bool:
    return all(
        all(is_exact(*each, sizes) for sizes in SIZES)
        and is_exact(*each, SIZES[1], bias=False)
        and is_nan_kept_apart(*each)
        for each in KERNELS
    )


def layer_linears(dtype: torch.dtype) -> dict[str, products.PackedLinear]:
    """Those of a small layer."""
    generator = torch.Generator().manual_seed(3)

    def linear(out_features: int, in_features: int) -> products.PackedLinear:
        weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
        return products.PackedLinear(products.pack(weight), None, torch.randn(out_features, generator=generator), dtype)

    return {name: linear(*shape) for name, shape in SHAPES.items()}


def is_nan_kept_apart(dtype: torch.dtype, kernel: str) -> bool:
    """Whether a token with NaN has no result but NaN, and disturbs no other; of an odd number of features."""
    x, packed, bias = torch.ones(3, 5), products.pack(torch.ones(4, 5).to(dtype)), torch.ones(4)
    x[1] = torch.nan
    result = products.linear(x, packed, None, bias, dtype, kernel=kernel)
    return bool(result[1].isnan().all() and (result[[0, 2]] == 6.0).all())
