"""The dropout masks of `erniem_fast/dropout.py` inside a kernel: the same bits, regenerated where they are needed."""

import triton
import triton.language as tl
from torch import Tensor

from .. import dropout
from ..dropout import Dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)


def launch_arguments(
    of: Dropout | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, float]:
    """What kernels take for a dropout: columns, sequence ids and seed, None without one, threshold and rescaling."""
    if of is None:
        return None, None, None, 0, 1.0
    # At p = 1 the threshold, which has to fit 32 bits, is one too low; the factor is 0 there and drops the rest.
    return of.columns, of.sequence_ids, of.seed, min(dropout.threshold(of.p), 2**32 - 1), dropout.rescale(of.p)


@triton.jit
def dropout_mask(seed, threshold, groups, column, sequence, head):
    """Which elements of a tile are kept; one evaluation of Philox decides four neighbours.

    Args:
        seed: int64, the key.
        threshold: what a kept element's word is at least.
        groups: int32 `[1, N / 4]`, the elements' last coordinate divided by 4.
        column, sequence, head: int32, the other coordinates, each a scalar or `[M, 1]`.

    Returns:
        bool `[M, N]`.
    """
    w0, w1, w2, w3 = tl.philox(seed, groups, column, sequence, head, n_rounds=ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, [words.shape[0], words.shape[1] * 4]) >= threshold.to(tl.uint32)


@triton.jit
def drop_features(x, seed, threshold, rescale, column, sequence, block, BLOCK: tl.constexpr):
    """Dropout of `[M, BLOCK]`, the features from `block · BLOCK` on of the tokens at `column` and `sequence`."""
    groups = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    return tl.where(dropout_mask(seed, threshold, groups, column, sequence, 0), x * rescale, 0.0)


@triton.jit
def dropout_mask_of_columns(seed, threshold, last, column, sequence, head):
    """`dropout_mask` where the last coordinates, int32 `[1, N]`, are no run of neighbours: an evaluation for each."""
    w0, w1, w2, w3 = tl.philox(seed, last // 4, column, sequence, head, n_rounds=ROUNDS)
    even = tl.where(last % 4 == 0, w0, w2)
    odd = tl.where(last % 4 == 1, w1, w3)
    return tl.where(last % 2 == 0, even, odd) >= threshold.to(tl.uint32)
