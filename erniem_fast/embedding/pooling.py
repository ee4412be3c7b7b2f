"""One vector for each sequence of a packed batch, without unpacking it."""

import torch
from torch import Tensor

POOLINGS = ("mean", "cls", "max", "last")


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """Reduces the hidden states of each sequence to one vector.

    Args:
        hidden: `(tokens, hidden)`, the tokens of all sequences, one sequence after another.
        cu_seqlens: integer `(sequences + 1,)`, where they start and end; no sequence is empty.
        pooling: `mean` or `max` over a sequence's tokens; `cls` or `last`, its first or its last token.

    Returns:
        float32 `(sequences, hidden)`.
    """
    hidden, cu_seqlens = hidden.float(), cu_seqlens.long()
    if pooling == "cls":
        return hidden[cu_seqlens[:-1]]
    if pooling == "last":
        return hidden[cu_seqlens[1:] - 1]
    return torch.segment_reduce(hidden, pooling, offsets=cu_seqlens)
