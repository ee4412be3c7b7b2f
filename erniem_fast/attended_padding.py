"""UIE-M's attention: padding is attended to, and [CLS] is not, because its weights were trained so.

The padding of a row is all one token: same id, same position, and so the same hidden state in every layer. One of them,
with the logarithm of their number as its key bias, stands for all exactly.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import key_bias_of
from .configuration import ErnieMConfig

HIDDEN_ID = 0  # [CLS]; the weights were trained with the mask `input_ids != 0`


class AttendedPadding(NamedTuple):
    """A grid of rows with one more column, in which each row's first place behind its real tokens is padding to attend
    to.

    Attributes:
        input_ids, positions: int64 `(rows, columns + 1)`, those of padding wherever a token is not real.
        real: bool `(rows, columns + 1)`, the real tokens.
        key_bias: float32 `(rows, columns + 1)`, see `Sequences`.
    """

    input_ids: Tensor
    positions: Tensor
    real: Tensor
    key_bias: Tensor


def attend_to_padding(
    config: ErnieMConfig, input_ids: Tensor, position_ids: Tensor | None, real: Tensor
) -> AttendedPadding:
    """Lays out rows as if each was padded to `config.uie_padded_length`.

    Args:
        config: the model's configuration.
        input_ids: int64 `(rows, columns)`.
        position_ids: int64 `(rows, columns)`, counted from 0; None for each token's column.
        real: bool `(rows, columns)`, True for real tokens.
    """
    real = F.pad(real, (0, 1))
    column = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    positions = column if position_ids is None else F.pad(position_ids, (0, 1))
    input_ids = F.pad(input_ids, (0, 1)).masked_fill(~real, config.pad_token_id)
    padding = (config.uie_padded_length - real.sum(1, keepdim=True)).clamp(min=0)
    behind = torch.where(real, column, -1).amax(1, keepdim=True) + 1
    key_bias = torch.where(column == behind, padding.float().log(), key_bias_of(real & (input_ids != HIDDEN_ID)))
    return AttendedPadding(input_ids, positions.masked_fill(~real, 0), real, key_bias)
