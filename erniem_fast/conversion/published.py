"""A result that PaddleNLP's tests hold for ernie-m-base, by which a conversion of its weights can be checked."""

import torch
from torch import Tensor

from ..modeling import ErnieMModel

_IDS = (0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2)
# Of the last hidden state, tokens 1 to 3 and features 1 to 3.
_EXPECTED = (
    (-0.02920425, -0.00768885, -0.10219190),
    (-0.10798159, 0.02311476, -0.17285497),
    (0.05675533, 0.01330730, -0.06826267),
)
_WORDS = 250002
_LARGEST_ERROR = 1e-3  # of float32; weights in 16 bits are off by more


def without_cls(ids: Tensor) -> Tensor:
    """The mask of Paddle where none is given, `(rows, 1, columns, columns)`: all keys but those with id 0, [CLS]'s."""
    rows, columns = ids.shape
    return (ids != 0).long()[:, None, None].expand(rows, 1, columns, columns)


def check(model: ErnieMModel) -> None:
    """
    Raises:
        ValueError: the model does not compute what ernie-m-base does.
    """
    if model.config.vocab_size <= max(_IDS):
        raise ValueError(
            f"The check is for ernie-m-base, with {_WORDS} words, not for a model with {model.config.vocab_size}."
        )
    ids = torch.tensor([_IDS])
    with torch.inference_mode():
        hidden = model.eval()(ids, attention_mask=without_cls(ids)).last_hidden_state.float()
    error = (hidden[0, 1:4, 1:4] - torch.tensor(_EXPECTED)).abs().max().item()
    if not error <= _LARGEST_ERROR:
        raise ValueError(
            f"The result is off by {error:.1e}, so that these are not the weights of ernie-m-base as published; "
            f"convert fine-tuned models without the check."
        )
