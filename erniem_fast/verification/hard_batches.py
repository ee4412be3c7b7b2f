"""Batches of a model on which packed encoders go wrong, made from its config."""

import torch
from torch import Tensor, nn

_LENGTHS = (1, 2, 9, 17, 33, 64)
_LONGEST = 512  # of the longest row: in float64, attention to more takes minutes on a CPU

Batch = dict[str, Tensor]


def hard_batches(bare: nn.Module) -> dict[str, Batch]:
    """Arguments of a bare model's forward, by what is hard about them, on its device.

    Args:
        bare: a model that has `longest_sequence`.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([min(each, bare.longest_sequence) for each in _LENGTHS])
    right = torch.arange(lengths.max()) < lengths[:, None]
    holes = torch.rand(right.shape, generator=generator) < 0.7
    holes[:, -1] = True  # so that every row has a token
    longest = torch.ones(1, min(bare.longest_sequence, _LONGEST), dtype=torch.bool)
    masks = {"padding on the right": right, "padding on the left": right.flip(1), "holes": holes, "longest": longest}
    batches = {name: _batch(bare, mask, generator) for name, mask in masks.items()}
    unmasked = batches["padding on the left"]
    return {
        **batches,
        "one token": {name: each[:, -1:] for name, each in unmasked.items()},
        "no mask": {name: each[-1:] for name, each in unmasked.items() if name != "attention_mask"},
    }


def ragged_batch(bare: nn.Module) -> Batch:
    """16 rows of 8 to 64 tokens, padded on the right, as of sentences."""
    longest = min(64, bare.longest_sequence)
    lengths = torch.linspace(min(8, longest), longest, 16).long()
    return _batch(bare, torch.arange(longest) < lengths[:, None], torch.Generator().manual_seed(1))


def _batch(bare: nn.Module, mask: Tensor, generator: torch.Generator) -> Batch:
    config = bare.config
    padding = config.pad_token_id or 0
    ids = torch.randint(0, config.vocab_size - 1, mask.shape, generator=generator)
    ids += ids >= padding  # any id but that of padding
    batch = {"input_ids": ids.where(mask, padding), "attention_mask": mask.long()}
    types = getattr(config, "type_vocab_size", 1)
    if types > 1:
        batch["token_type_ids"] = torch.randint(0, types, mask.shape, generator=generator)
    return {name: each.to(bare.device) for name, each in batch.items()}
