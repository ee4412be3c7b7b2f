"""The dropout masks of `erniem_fast/dropout.py` inside a kernel: the same bits, generated wherever they are needed."""

import triton
import triton.language as tl
from torch import Tensor

from .. import dropout
from ..dropout import Dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)


def launch_arguments(
    of: Dropout | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, float]:
    """A dropout as kernels take it: columns, sequence ids, seed (None without dropout), threshold and rescaling."""
    if of is None:
        return None, None, None, 0, 1.0
    # At p = 1 the threshold, 2^32, does not fit 32 bits. One less would keep a few elements, but their factor is 0.
    return of.columns, of.sequence_ids, of.seed, min(dropout.threshold(of.p), 2**32 - 1), dropout.rescale(of.p)


@triton.jit
def dropout_mask(seed, threshold, groups, column, sequence, head, INTERLEAVED: tl.constexpr = False):
    """The dropout mask of a tile; one evaluation of Philox decides for four neighbours.

    Args:
        seed: int64, the key.
        threshold: an element is kept if its 32-bit word is at least this.
        groups: int32 `[1, N / 4]`, the elements' last coordinate divided by 4.
        column, sequence, head: int32, the other coordinates, each a scalar or `[M, 1]`.
        INTERLEAVED: whether the elements stand in the order of `interleaved`; N is then a multiple of 16.

    Returns:
        bool `[M, N]`, True for elements that are kept.
    """
    w0, w1, w2, w3 = tl.philox(seed, groups, column, sequence, head, n_rounds=ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if INTERLEAVED:
        words = tl.permute(tl.reshape(words, [words.shape[0], words.shape[1] // 4, 4, 2, 2]), [0, 1, 3, 2, 4])
        words = tl.reshape(words, [words.shape[0], words.shape[1] * 4, 2, 2])
    return tl.reshape(words, [words.shape[0], words.shape[1] * 4]) >= threshold.to(tl.uint32)


@triton.jit
def interleaved(index):
    """The elements that stand at `index`: of every 16, in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15.

    A thread of NVIDIA's matrix products holds four numbers in every 16 columns of a row: two neighbours, and the two
    that are 8 further. In this order they are four neighbours, for which one evaluation of Philox decides.
    """
    return index // 16 * 16 + index % 8 // 2 * 4 + index % 16 // 8 * 2 + index % 2


@triton.jit
def drop_features(x, seed, threshold, rescale, column, sequence, block, BLOCK: tl.constexpr):
    """Dropout of the tile x, `[M, BLOCK]`: features from `block · BLOCK` on, of the tokens at `column`, `sequence`."""
    groups = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    return tl.where(dropout_mask(seed, threshold, groups, column, sequence, 0), x * rescale, 0.0)


@triton.jit
def dropout_mask_of_columns(seed, threshold, last, column, sequence, head):
    """`dropout_mask` for last coordinates, int32 `[1, N]`, that are not consecutive: one evaluation per element."""
    w0, w1, w2, w3 = tl.philox(seed, last // 4, column, sequence, head, n_rounds=ROUNDS)
    even = tl.where(last % 4 == 0, w0, w2)
    odd = tl.where(last % 4 == 1, w1, w3)
    return tl.where(last % 2 == 0, even, odd) >= threshold.to(tl.uint32)
