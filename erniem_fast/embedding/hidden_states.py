"""Hidden states of texts' tokens, packed, from any encoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import families, flags
from ..batch import TokenBatch
from ..families import fallback
from ..families.positions import CountedPositions
from ..modeling import ErnieMModel
from .batches import Tokens


class Packed(NamedTuple):
    """The tokens of several texts, one text after another.

    Attributes:
        ids: int64 `(tokens,)`.
        types: int64 `(tokens,)`; None where the tokenizer returns none.
        cu_seqlens: int32 `(texts + 1,)`, where texts start and end.
        lengths: of the texts.
    """

    ids: Tensor
    types: Tensor | None
    cu_seqlens: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, texts: list[Tokens], device: torch.device) -> "Packed":
        lengths = [len(each.ids) for each in texts]
        types = None if texts[0].types is None else torch.cat([each.types for each in texts]).to(device)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(torch.cat([each.ids for each in texts]).to(device), types, bounds.to(device), lengths)

    def padded(self, pad_id: int) -> dict[str, Tensor]:
        """A model's arguments, each `(texts, columns)`, with padding on the right."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        mask = torch.arange(max(self.lengths), device=lengths.device) < lengths[:, None]
        arguments = {"input_ids": _on_grid(self.ids, mask, pad_id), "attention_mask": mask.long()}
        return arguments if self.types is None else arguments | {"token_type_ids": _on_grid(self.types, mask, 0)}


def _on_grid(values: Tensor, mask: Tensor, padding: int) -> Tensor:
    return values.new_full(mask.shape, padding).masked_scatter_(mask, values)


def pads(bare: nn.Module) -> bool:
    """Whether a bare model has to be given padded rows: those that `optimize` has not taken, or that fall back."""
    if isinstance(bare, ErnieMModel):
        return False
    if not families.is_packed(bare):
        return True
    ids = torch.zeros(1, 1, dtype=torch.long)
    arguments = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "inputs_embeds"))
    return fallback.reason(bare, arguments | {"input_ids": ids}) is not None


def token_states(bare: nn.Module, packed: Packed, padded: bool, pad_id: int | None) -> Tensor:
    """`(tokens, hidden)`, the last hidden states of any bare model, which is given rows with `pad_id` if it pads."""
    if not padded:
        return hidden_states(bare, packed)
    arguments = packed.padded(pad_id or 0)
    return bare(**arguments).last_hidden_state[arguments["attention_mask"].bool()]


def hidden_states(bare: nn.Module, packed: Packed) -> Tensor:
    """`(tokens, hidden)`, the last hidden states of a bare model that does not pad."""
    longest = max(packed.lengths)
    if isinstance(bare, ErnieMModel):
        output = bare(input_ids=packed.ids[None], cu_seq_lens_q=packed.cu_seqlens, max_length_q=longest)
        return output.last_hidden_state[0]
    batch = TokenBatch.from_cu_seqlens(packed.cu_seqlens, longest, len(packed.ids))
    types = torch.zeros_like(packed.ids) if packed.types is None else packed.types
    with flags.held():
        output = bare.encode_packed(batch, packed.ids, _positions(bare, packed.ids, batch), types)
    return output.last_hidden_state[0]


def _positions(bare: nn.Module, ids: Tensor, batch: TokenBatch) -> Tensor:
    """int64 `(tokens,)`, the rows of the position table that transformers takes for these ids."""
    if not isinstance(bare, CountedPositions):
        return batch.columns
    padding = bare.embeddings.padding_idx
    real = (ids != padding).long()
    counted = real.cumsum(0)
    starts = batch.sequences.cu_seqlens[:-1].long()
    before = (counted - real)[starts]  # the tokens counted before each text
    return (counted - before[batch.sequences.sequence_ids]) * real + padding
