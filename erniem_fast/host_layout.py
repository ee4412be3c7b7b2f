"""Input of few tokens for a GPU is laid out on the host, and moved to the GPU in one copy.

To lay a batch out takes some twenty small operators. Up to thousands of tokens, the host takes longer to ask a GPU for
one of them than to compute it itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from . import modes

_MOST_ELEMENTS = 8192
_ALIGNMENT = 16  # bytes; kernels are compiled for pointers that are multiples of it

Layout = TypeVar("Layout")


def serves(input_ids: Tensor | None, *others: Tensor | None) -> bool:
    """Whether to lay out this input, all its tensors, on the host; ids are None where embeddings came instead."""
    # First, because in a graph that is recorded the size would become a condition.
    if modes.is_recorded() or input_ids is None or input_ids.device.type == "cpu":
        return False
    if input_ids.numel() > _MOST_ELEMENTS:
        return False
    given = [each for each in (input_ids, *others) if each is not None]
    # A mask per query stays on the GPU, and so do tensors that a graph or a transform follows.
    per_query = any(each.dim() > 2 for each in given)
    return not (per_query or modes.is_followed(given) or modes.is_transformed() or modes.is_captured())


def on_host(*values: Tensor | None) -> list[Tensor | None]:
    return [None if each is None else each.cpu() for each in values]


def to_device(layout: Layout, device: torch.device) -> Layout:
    """A dataclass with all tensors inside it, also of dataclasses and named tuples, on another device."""
    found: dict[int, Tensor] = {}
    _mapped(layout, lambda tensor: found.setdefault(id(tensor), tensor))
    moved = dict(zip(found, _copied([*found.values()], device), strict=True))
    return _mapped(layout, lambda tensor: moved[id(tensor)])


def _mapped(value: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), function) for field in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_mapped(each, function) for each in value)
    return value


def _copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors on another device, which share one piece of memory there."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    for tensor, place in zip(tensors, _views(memory, tensors, sizes), strict=True):
        place.copy_(tensor)
    # CUDA has read pageable memory when a copy returns that does not wait for its end.
    return _views(memory.to(device, non_blocking=device.type == "cuda"), tensors, sizes)


def _views(memory: Tensor, tensors: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
    """Parts of the memory with the dtypes and shapes of tensors."""
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(memory.split(sizes), tensors, strict=True)
    ]
