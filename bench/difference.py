"""How far two results are apart; nothing is timed whose result is wrong."""

import torch
from torch import Tensor

# The largest relative error of a row that is right: after some roundings to 16 bits, and in float32 after sums of
# thousands of terms. One of k independent roundings adds at most half an epsilon, so all add up to √k / 2 epsilons at
# the most: 4 allow for 64. Attention in bfloat16, with scores and probabilities rounded too, has errors of 1.1.
LARGEST_ERROR = {
    "float32": 1e-5,
    "float16": 4 * torch.finfo(torch.float16).eps,
    "bfloat16": 4 * torch.finfo(torch.bfloat16).eps,
}


def row_error(output: Tensor, exact: Tensor) -> float:
    """The largest error of a row, a vector of features; infinite where shapes differ, NaN where a value is.

    Errors and rows are measured by their root mean square, which unlike the largest element grows neither with the
    number of elements nor by chance. A row that is smaller than most is held to the size of all.

    Args:
        output: `(..., features)`.
        exact: the same computed in float64.
    """
    if output.shape != exact.shape:
        return float("inf")
    exact = exact.double()
    squares, errors = exact.square().mean(-1), (output.double() - exact).square().mean(-1)
    return (errors / squares.clamp(min=squares.mean())).max().sqrt().item()


def difference(output: Tensor, reference: Tensor) -> float:
    """Largest difference over the root mean square of `reference`; infinite where shapes differ."""
    if output.shape != reference.shape:
        return float("inf")
    return ((output - reference).abs().max() / reference.double().square().mean().sqrt()).item()
