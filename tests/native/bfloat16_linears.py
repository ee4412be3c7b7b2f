"""Products with weights in bfloat16, against the same numbers in float64."""

import torch

from erniem_fast.native import packed as products

# Tokens, features that come in and go out: odd numbers of all, a block and more, and more tokens than a tile has.
SIZES = [(1, 1, 1), (5, 3, 33), (13, 1031, 7), (30, 96, 32), (200, 70, 65)]


def is_exact(tokens: int, in_features: int, out_features: int, bias: bool = True) -> bool:
    """Whether a product's error is below what adding up in float32 can lose; memory beyond rows holds NaN."""
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(tokens, in_features, generator=generator) * torch.logspace(-6, 6, tokens)[:, None]
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    added = torch.randn(out_features, generator=generator) if bias else None
    out = torch.full((tokens, out_features + 3), torch.nan)
    products.linear(x, products.pack(weight), None, added, out[:, 1:-2])
    rounded = x.bfloat16().double()
    exact = rounded @ weight.double().t() + (added.double() if bias else 0.0)
    magnitudes = rounded.abs() @ weight.double().abs().t() + (added.double().abs() if bias else 0.0)
    # The instruction adds two products at a time, and may round each of them and their sum.
    bound = (in_features + 2) * torch.finfo(torch.float32).eps * magnitudes
    return bool(((out[:, 1:-2] - exact).abs() <= bound).all() and out[:, [0, -2, -1]].isnan().all())


def are_all_exact() -> bool:
    return all(is_exact(*sizes) for sizes in SIZES) and is_exact(5, 3, 33, bias=False) and is_nan_kept_apart()


def is_nan_kept_apart() -> bool:
    """Whether a token with NaN has no result but NaN, and disturbs no other; of an odd number of features."""
    x, packed, bias = torch.ones(3, 5), products.pack(torch.ones(4, 5).bfloat16()), torch.ones(4)
    x[1] = torch.nan
    result = products.linear(x, packed, None, bias)
    return bool(result[1].isnan().all() and (result[[0, 2]] == 6.0).all())
