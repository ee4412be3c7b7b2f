"""Packed batches, and their dropout."""

import torch

from erniem_fast.batch import TokenBatch

SEED = torch.tensor([0x299F31D0A4093822])


def sequences(*lengths, bound=None, device="cpu"):
    """Sequences of these lengths that came packed; `bound` is that of their lengths, by default the largest."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    return TokenBatch.from_cu_seqlens(cu_seqlens, bound or max(lengths, default=0), sum(lengths))


def two_sequences(tokens, device="cpu"):
    """So many tokens in two sequences, the second of which starts where a tile does not."""
    return sequences(tokens // 3, tokens - tokens // 3, bound=tokens, device=device)


def dropout_of(batch, p, seed=SEED):
    """The batch's dropout; None where nothing is dropped."""
    return batch.dropout(p, seed) if p and seed is not None else None
