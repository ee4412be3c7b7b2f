"""Layers that follow each other, by Triton's kernels and PyTorch's products, with parameters that were checked once.

A GPU computes few tokens sooner than the host asks for them: op by op, one sentence took 11 ms on an H100, by CUDA
graphs 1 (bench/results/nvidia-h100-80gb-hbm3).
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Sequences
from .ops.choose import choose
from .ops.triton import on_device
from .reference import Norm


class Linear(NamedTuple):
    """A linear's parameters, `(out_features, in_features)` and `(out_features,)`."""

    weight: Tensor
    bias: Tensor


class LayerParameters(NamedTuple):
    """What a layer computes with.

    Attributes:
        qkv: the linears of queries, keys and values.
        out, up, down: the other linears.
        norm1, norm2: the layer norms, each with a bias.
        heads, scale: as in `ops.attention`.
        activation: as in `ops.bias_gelu`.
    """

    qkv: tuple[Linear, Linear, Linear]
    out: Linear
    up: Linear
    down: Linear
    norm1: Norm
    norm2: Norm
    heads: int
    scale: float
    activation: str


class KernelLayers:
    """The layers of a call for `(tokens, hidden)`: all ops and products in turn, without dropout or head mask.

    It reads the parameters that it was made of: callers make sure that they are still the model's.
    """

    copied = False  # as `native.layer.Layers` has it

    def __init__(self, layers: Sequence[LayerParameters]) -> None:
        """
        Args:
            layers: of each layer its parameters, biases and norms contiguous; all linears in one dtype.
        """
        self.layers = layers
        parts = [linear for layer in layers for linear in layer.qkv]
        self._weights, self._biases = ([getattr(part, name) for part in parts] for name in Linear._fields)
        self._rows = [sum(len(linear.bias) for linear in layer.qkv) for layer in layers]
        self._head_dims = {layer.qkv[0].weight.shape[0] // layer.heads for layer in layers}
        self._place = (self._weights[0].dtype, self._weights[0].device)

    def serves(self, x: Tensor) -> bool:
        """Whether the ops of all layers would run by Triton's kernels for `x`."""
        if (x.dtype, x.device) != self._place:
            return False
        chosen = [choose(op, x.device, x.dtype) for op in ("bias_gelu", "add_norm")]
        chosen += [choose("attention", x.device, x.dtype, size) for size in self._head_dims]
        return set(chosen) == {"triton"}

    def __call__(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Runs the layers on `(tokens, hidden)`; returns the same shape, in new memory."""
        attention, bias_gelu, add_norm = (module.forward for module in kernels())
        x, sequences = x.contiguous(), Sequences._make(contiguous(sequences))
        with on_device(x.device):
            # One copy of all weights takes the host as long as one of a layer's.
            weights, biases = (torch.cat(each).split(self._rows) for each in (self._weights, self._biases))
            for layer, weight, bias in zip(self.layers, weights, biases, strict=True):
                # One name for all intermediate results, so that each is freed as soon as the next is computed.
                inner = F.linear(x, weight, bias)
                inner, _ = attention(inner, sequences, layer.heads, layer.scale, None)
                inner = F.linear(inner, layer.out.weight)
                x, _ = add_norm(x, inner, layer.out.bias, layer.norm1, None, save=False)
                inner = F.linear(x, layer.up.weight)
                inner = bias_gelu(inner, layer.up.bias, layer.activation, None)
                inner = F.linear(inner, layer.down.weight)
                x, _ = add_norm(x, inner, layer.down.bias, layer.norm2, None, save=False)
        return x


def kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The kernels of attention, bias_gelu and add_norm, imported by the first call, as Triton may be missing."""
    attention, bias_gelu, add_norm = (
        import_module(f"erniem_fast.kernels.{name}") for name in ("attention", "bias_gelu", "add_norm")
    )
    return attention, bias_gelu, add_norm


def contiguous(values: Iterable[object]) -> list[object]:
    """The values with tensors as kernels read them."""
    return [each.contiguous() if isinstance(each, Tensor) else each for each in values]
