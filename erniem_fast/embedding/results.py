"""Results of consecutive windows, as one array or as a stream of arrays."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def collect(
    windows: Iterator[tuple[list, Tensor]], total: int | None, shape: tuple[int, ...], convert_to_tensor: bool
) -> np.ndarray | Tensor | Iterator[np.ndarray] | Iterator[Tensor]:
    """One array of the results of `total` items, each of this shape; an iterator over arrays if `total` is None."""
    found = (result for _, result in windows)
    if total is None:
        return found if convert_to_tensor else map(Tensor.numpy, found)
    results, start = torch.empty(total, *shape), 0
    for part in found:
        end = start + len(part)
        if end <= total:
            results[start:end] = part
        start = end
    if start != total:
        raise ValueError(f"The length of the input is {total}, but it holds {start} items; pass a list of them.")
    return results if convert_to_tensor else results.numpy()
