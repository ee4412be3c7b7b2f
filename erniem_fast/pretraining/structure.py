"""Who attends to whom in packed samples, and the encoder's run on them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modeling import IGNORED_LABEL, ErnieMModel


class Structure(NamedTuple):
    """How the tokens of packed samples stand to each other.

    Attributes:
        position_ids: int64 `(1, tokens)`, counted from 0.
        cu_seqlens: int32 `(samples + 1,)`, where samples start and end.
        max_seqlen: the longest sample's length.
        key_ranges: integer `(tokens, 2)`: each token attends to the tokens of its sample from the first number to
            before the second, counted within the sample; None if all attend to all.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    key_ranges: Tensor | None

    def per_token(self, values: Tensor) -> Tensor:
        """`(samples,)` to `(tokens,)`: each token's is its sample's."""
        return values.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.position_ids.shape[1])

    def indices(self) -> Tensor:
        """int64 `(tokens,)`, each token's place in its sample."""
        token = torch.arange(self.position_ids.shape[1], device=self.cu_seqlens.device)
        return token - self.per_token(self.cu_seqlens[:-1].long())


def encode(encoder: ErnieMModel, inputs_embeds: Tensor, structure: Structure) -> Tensor:
    """The last layer's result, `(tokens, hidden)`, of the words' embeddings, `(1, tokens, hidden)`."""
    positions, cu_seqlens, max_seqlen, key_ranges = structure
    packed = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_seqlen, "key_ranges": key_ranges}
    return encoder(inputs_embeds=inputs_embeds, position_ids=positions, **packed).last_hidden_state[0]


class FirstStep(NamedTuple):
    """BTMLM's first step.

    Attributes:
        chosen: bool `(tokens,)` of the packed samples, True for those of BTMLM; all else is of these alone.
        input_ids: int64 `(1, tokens)`, the texts without masks, and the placeholders.
        structure: texts attend to themselves, and what is behind them to all.
    """

    chosen: Tensor
    input_ids: Tensor
    structure: Structure


def first_step(input_ids: Tensor, labels: Tensor, structure: Structure, source_lengths: Tensor) -> FirstStep:
    """BTMLM's first step, from the second step's tokens.

    Args:
        input_ids, labels: int64 `(1, tokens)`.
        structure: the second step's.
        source_lengths: int64 `(samples,)`, the number of tokens of BTMLM's texts; 0 for samples of other objectives. If
            there are no texts of BTMLM, the first sample takes the place of one.
    """
    lengths = structure.cu_seqlens.diff().long()
    source_lengths = source_lengths.clone()
    source_lengths[0] = torch.where(source_lengths.any(), source_lengths[0], lengths[0])
    chosen = structure.per_token(source_lengths > 0)
    limits, everything = structure.per_token(source_lengths), structure.per_token(lengths)
    ends = torch.where(structure.indices() < limits, limits, everything)
    lengths = lengths[source_lengths > 0]
    within = Structure(
        position_ids=structure.position_ids[:, chosen],
        cu_seqlens=pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=structure.max_seqlen,
        key_ranges=torch.stack([torch.zeros_like(ends), ends], 1)[chosen],
    )
    return FirstStep(chosen, torch.where(labels == IGNORED_LABEL, input_ids, labels)[:, chosen], within)
