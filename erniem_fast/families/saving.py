"""Rounded weights of models of transformers are not saved: transformers would load them as the original ones.

A model around the one that `optimize` took is transformers' own and saves itself, so the bare model has to refuse.
"""

import inspect
import sys

from torch import nn
from transformers import PreTrainedModel

from ..inference import inference_module

_SAVE = inspect.unwrap(PreTrainedModel.save_pretrained).__code__


def refuse_saving(model: nn.Module) -> None:
    """Refuses to be a part of what `save_pretrained` writes, if weights are rounded.

    Raises:
        RuntimeError: they are, and the state of the model is being saved.
    """
    found = inference_module(model)
    if found is None or found.weights == "packed" or not _is_saved():
        return
    raise RuntimeError(
        f"A model of transformers with {found.weights} weights cannot be saved, because transformers would load them "
        f"as if they were the original ones; call erniem_fast.restore(model) first."
    )


def _is_saved() -> bool:
    """Whether `save_pretrained` asks for the state, of more than adapters."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _SAVE:
            return not getattr(frame.f_locals["self"], "_hf_peft_config_loaded", False)
        frame = frame.f_back
    return False
