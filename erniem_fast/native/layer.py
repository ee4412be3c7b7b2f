"""Whole layers in one call, for few tokens, where Python between the ops would take a quarter of the time."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..batch import Sequences
from .bias_gelu import ACTIVATIONS
from .function import FLOAT, INT, Filled, Function, Structure

# For more tokens Python between the ops hardly shows. On two cores of an EPYC (Zen 5), a forward at base size takes
# 0.90 times as long as op by op at 24 tokens, 0.93 times at 64, and 0.98 times at 256.
MOST_TOKENS = 128

# The features of a layer's products: those that they return, and those that they take.
LINEARS = {
    "q": ("projected", "hidden"),
    "k": ("projected", "hidden"),
    "v": ("projected", "hidden"),
    "out": ("hidden", "projected"),
    "up": ("intermediate", "hidden"),
    "down": ("hidden", "intermediate"),
}
NORMS = {f"{name}_{part}": (FLOAT, "hidden") for name in ("norm1", "norm2") for part in ("weight", "bias")}
SIZES = "hidden projected intermediate heads activation"
FACTORS = "norm1_eps norm2_eps scale"

_LAYER = Structure(
    "Layer",
    {
        **{
            f"{name}_{part}": tensor
            for name, shape in LINEARS.items()
            for part, tensor in (("weight", (FLOAT, *shape)), ("bias", (FLOAT, shape[0])))
        },
        **NORMS,
    },
    sizes=SIZES,
    factors=FACTORS,
)


def forward_of(name: str) -> Function:
    """A function of csrc/ that runs layers one after another."""
    return Function(
        name,
        {
            "x": (FLOAT, "tokens", "hidden"),
            "layers": (INT, "count"),
            "longest_first": (INT, "sequences"),
            "cu_seqlens": (torch.int32, "sequences + 1"),
            "key_bias": (FLOAT, "tokens"),
            "key_ranges": (torch.int32, "tokens", 2),
            "out": (FLOAT, "tokens", "hidden"),
        },
        sizes="tokens hidden count sequences threads",
        written=("out",),
        optional=("key_bias", "key_ranges"),
    )


# Takes what `parameters` gives.
LAYERS = forward_of("layers_forward")


class Layers:
    """Layers that follow each other, with parameters that were checked once, for many calls.

    A call is for float32 `(tokens, hidden)` on the CPU, and gives the result of all layers' ops and products in turn,
    without dropout, head mask or probabilities, in the same shape. It reads the parameters where they were in memory
    when this object was made: callers make sure that they are still there.

    Attributes:
        function: what runs them.
        copied: whether it reads copies of parameters that csrc/ cannot read where they are.
    """

    def __init__(self, layers: Sequence[Filled], function: Function) -> None:
        """
        Args:
            layers: of each layer its parameters.
            function: runs layers with such parameters: `LAYERS`, or that of `int8`.

        Raises:
            ValueError: layers take different numbers of features.
        """
        self.function = function
        self._structures = [each.structure for each in layers]
        self._copies = [each.tensors for each in layers if each.copied]
        self._addresses = torch.tensor([ctypes.addressof(each) for each in self._structures], dtype=torch.int64)
        widths = {each.hidden for each in self._structures}
        if len(widths) != 1:
            raise ValueError(f"layers take {sorted(widths)} features, but all have to take the same number.")
        (self._hidden,) = widths

    @property
    def copied(self) -> bool:
        return bool(self._copies)

    def __call__(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Runs the layers.

        Args:
            x: float32 `(tokens, hidden)` on the CPU.
            sequences: how tokens are cut into sequences.

        Raises:
            ValueError, BuildError, RuntimeError: see `Function.__call__`.
        """
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.function(
            x.device,
            x.dtype,
            x=x,
            layers=self._addresses,
            longest_first=sequences.longest_first,
            cu_seqlens=sequences.cu_seqlens,
            key_bias=sequences.key_bias,
            key_ranges=sequences.key_ranges,
            out=out,
            hidden=self._hidden,
            threads=torch.get_num_threads(),
        )
        return out


def parameters(
    linears: dict[str, nn.Linear], norms: dict[str, nn.LayerNorm], heads: int, scale: float, activation: str
) -> Filled:
    """A layer's parameters, for `Layers`.

    Args:
        linears: `q`, `k`, `v`, `out`, `up` and `down`, in float32 with a bias each.
        norms: `norm1` and `norm2`, in float32 with a bias each.
        heads, scale: as in `ops.attention`.
        activation: a key of `ACTIVATIONS`.

    Raises:
        ValueError: see `Structure.fill`.
    """
    modules = {**linears, **norms}
    return _LAYER.fill(
        torch.device("cpu"),
        FLOAT,
        **{f"{name}_weight": module.weight for name, module in modules.items()},
        **{f"{name}_bias": module.bias for name, module in modules.items()},
        **{f"{name}_eps": norm.eps for name, norm in norms.items()},
        heads=heads,
        activation=ACTIVATIONS[activation],
        scale=scale,
    )
