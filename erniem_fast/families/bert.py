"""BERT: positions count from 0, padding included."""

import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as modeling

from .packed import PackedEncoder, PackedLayer, PackedModel


class BertLayer(PackedLayer, modeling.BertLayer):
    pass


class BertEncoder(PackedEncoder, modeling.BertEncoder):
    layer_kind = BertLayer


class BertModel(PackedModel, modeling.BertModel):
    encoder_kind = BertEncoder
    first_position = 0

    def default_positions(self, input_ids: Tensor | None, grid: tuple[int, int], device: torch.device) -> Tensor:
        return torch.arange(grid[1], device=device).expand(grid)
