"""Layers that follow each other as one native call, with parameters that are checked once for many calls.

Python between the ops would take a quarter of a forward of few tokens; and between the layers, with the checks of some
hundred modules and tensors, half a millisecond.
"""

import weakref

import torch
from torch import Tensor, nn

from . import flags, matmul, modes
from .batch import TokenBatch
from .inference import multiplies_natively
from .native import packed
from .native.layer import MOST_TOKENS, Layers
from .ops.choose import choose


class Prepared:
    """Layers that were checked, and what says how long that holds; kept by what holds the layers, or by the layer."""

    def __init__(self, owner: nn.Module, layers: Layers | None, footprint: modes.Footprint) -> None:
        """
        Args:
            owner: what keeps it.
            layers: None if they cannot run as one call.
            footprint: of `owner`.
        """
        self.layers = layers
        self._owner, self._footprint = weakref.ref(owner), footprint

    def is_for(self, owner: nn.Module) -> bool:
        """Whether it holds still, and not for a module that this one was copied from."""
        return self._owner() is owner and self._footprint.is_current()

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies have weights of their own


def run(owner: nn.Module, hidden: Tensor, batch: TokenBatch) -> Tensor | None:
    """The results of a layer, or of layers in turn, without dropout, head mask or probabilities, by one call.

    Args:
        owner: the layer, or what holds the layers. It has an attribute `prepared` for this function, and a method
            `native_parameters` that returns the native function of each layer and its parameters, or None.
        hidden: `(tokens, hidden)`.
        batch: the tokens.

    Returns:
        `(tokens, hidden)`; None if a call would not give the numbers of the modules, or not sooner.
    """
    eager = hidden.dtype == torch.float32 and hidden.device.type == "cpu" and modes.may_write(hidden)
    if not (eager and _runs_natively()):
        return None
    prepared = owner.prepared
    if prepared is None or not prepared.is_for(owner):
        prepared = _prepare(owner)
        # Copies of weights would miss what changes in place.
        owner.prepared = None if prepared.layers is not None and prepared.layers.copied else prepared
    if prepared.layers is None or not _multiplies_natively(prepared.layers, hidden):
        return None
    return prepared.layers(hidden, batch.sequences)


def _prepare(owner: nn.Module) -> Prepared:
    footprint = modes.Footprint(owner)
    found = owner.native_parameters() if footprint.is_plain else None
    functions = {function for function, _ in found or ()}
    layers = Layers([parameters for _, parameters in found], *functions) if len(functions) == 1 else None
    return Prepared(owner, layers, footprint)


@flags.while_held
def _runs_natively() -> bool:
    """Whether every op inside a layer would run natively, unverified, on the CPU in float32."""
    ops_of_layer = ("attention", "bias_gelu", "add_norm")
    return flags.read(flags.VERIFY) == "0" and all(
        choose(op, torch.device("cpu"), torch.float32) == "native" for op in ops_of_layer
    )


def _multiplies_natively(layers: Layers, hidden: Tensor) -> bool:
    """Whether the layers' products would be native: with packed weights at every length, in float32 for few tokens."""
    if layers.function is packed.LAYERS:
        return multiplies_natively(hidden)
    return hidden.shape[0] <= MOST_TOKENS and matmul.library_of(matmul.FORWARD, hidden) == matmul.NATIVE
