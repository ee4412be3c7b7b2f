"""Counter-based dropout: whether an element is kept depends only on the seed and the element's logical coordinates.

The generator is Philox4x32 with 7 rounds, the smallest number that passes BigCrush (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011, table 2). One evaluation yields the words of four neighbours:

    words(c0, c1, c2, c3)[w] decides for the element with the last coordinate 4 * c0 + w

    op                     last coordinate   c1             c2         c3
    embeddings, FFN, LN    feature           column         sequence   0
    attention              key column        query column   sequence   head

Columns count from the start of a sequence's row in the padded grid, so that a token's mask is the same in the packed
and the padded layout. The same bits come out of `tl.philox(seed, c0, c1, c2, c3, n_rounds=ROUNDS)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

ROUNDS = 7

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Dropout(NamedTuple):
    """The dropout of one tensor: everything that its mask depends on, except the last coordinate.

    Attributes:
        p: probability of dropping an element, in [0, 1].
        seed: int64, one element.
        columns: int64 `(tokens,)`, each token's column in the padded grid.
        sequence_ids: int64 `(tokens,)`, the index of each token's sequence.
    """

    p: float
    seed: Tensor
    columns: Tensor
    sequence_ids: Tensor


def is_active(dropout: nn.Module) -> bool:
    """Whether a dropout module drops anything now; a module in its place, such as `nn.Identity`, never does."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 `(count,)`, seeds from torch's generator of the device, drawn without a synchronisation."""
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """An element is kept if its 32-bit word is at least this: with probability 1 - p, to within 2^-32."""
    return round(p * 2**32)


def rescale(p: float) -> float:
    """The factor of kept elements; 0 if p is so close to 1 that none is kept."""
    return 0.0 if threshold(p) == 2**32 else 1.0 / (1.0 - p)


def dropout_mask(
    seed: Tensor, p: float, width: int, column: Tensor, sequence: Tensor, head: Tensor | int = 0
) -> Tensor:
    """The dropout mask of elements with the last coordinates `0 … width - 1`.

    Args:
        seed: int64 tensor with one element.
        p: probability of dropping an element, in [0, 1].
        width: number of features, or of key columns.
        column, sequence, head: the other coordinates, integer tensors that broadcast to a common shape `(...)`.

    Returns:
        bool `(..., width)`, True for elements that are kept.
    """
    groups = torch.arange((width + 3) // 4, device=seed.device)
    head = torch.as_tensor(head, device=seed.device)
    words = philox(seed, groups, column.long().unsqueeze(-1), sequence.long().unsqueeze(-1), head.long().unsqueeze(-1))
    limit = threshold(p)
    return torch.stack([word >= limit for word in words], dim=-1).flatten(-2)[..., :width]


def drop_features(x: Tensor, dropout: Dropout | None) -> Tensor:
    """The dropout of `(tokens, features)`; x itself if `dropout` is None."""
    if dropout is None:
        return x
    mask = dropout_mask(dropout.seed, dropout.p, x.shape[-1], dropout.columns, dropout.sequence_ids)
    return apply_mask(x, mask, dropout.p)


def apply_mask(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Zeroes dropped elements and rescales kept ones: dropout of `x` in a forward, of the gradient in a backward."""
    return torch.where(mask, x * rescale(p), 0.0)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold unsigned 32-bit words.

    Args:
        seed: int64 tensor with one element, the 64-bit key.
        c0, c1, c2, c3: the counter, int64 tensors that broadcast together.
        rounds: cuRAND uses 10; the module's docstring gives the reason for the default.

    Returns:
        Four int64 tensors of the broadcast shape, each a word in [0, 2^32).
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # The product may overflow a signed 64-bit integer, but both of its 32-bit halves stay correct.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((first >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
