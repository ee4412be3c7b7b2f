"""Packed batches, and their dropout."""

import torch

from erniem_fast.batch import TokenBatch

SEED = torch.tensor([0x299F31D0A4093822])


def sequences(*lengths, bound=None, device="cpu"):
    """Sequences of these lengths that came packed; `bound` is that of their lengths, by default the largest."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    return TokenBatch.from_cu_seqlens(cu_seqlens, bound or max(lengths, default=0), sum(lengths))


def ranged(*lengths, device="cpu"):
    """Sequences whose queries see ranges of keys of all kinds: whole, empty, of one key, upside down, beyond the end.

    Those of CAMLM are among them: in each sequence, a quarter of the tokens sees the first half, as many the second,
    and the others their own quarter.
    """
    batch, generator = sequences(*lengths, device=device), torch.Generator().manual_seed(0)
    ranges = []
    for length in lengths:
        quarter, index = -(-length // 4), torch.arange(length)
        first = (index // max(quarter, 1)).clamp(max=3)
        camlm = torch.tensor([[0, 2], [1, 2], [2, 3], [2, 4]])[first] * quarter
        drawn = torch.randint(-2, length + 3, (length, 2), generator=generator)
        ranges.append(torch.where(index[:, None] % 16 < 12, camlm, drawn))
    return batch.attending_to(torch.cat(ranges).int().to(device))


def two_sequences(tokens, device="cpu"):
    """So many tokens in two sequences, the second of which starts where a tile does not."""
    return sequences(tokens // 3, tokens - tokens // 3, bound=tokens, device=device)


def dropout_of(batch, p, seed=SEED):
    """The batch's dropout; None where nothing is dropped."""
    return batch.dropout(p, seed) if p and seed is not None else None
