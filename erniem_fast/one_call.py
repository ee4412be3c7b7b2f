"""Layers that follow each other, run without their modules, with parameters that are checked once for many calls.

On a CPU they are one native call, on a GPU kernels and products one after another. Python between the ops, with its
checks of some hundred modules and tensors, would take a quarter of a forward of few tokens on a CPU, and most of it on
a GPU.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import flags, kernel_training, matmul, modes
from .batch import TokenBatch
from .inference import multiplies_natively
from .kernel_layers import KernelLayers
from .kernel_training import LayerDropouts
from .native import packed
from .native.layer import MOST_TOKENS, Layers
from .ops.choose import choose

AnyLayers = Layers | KernelLayers


class Prepared:
    """Layers that were checked, and what says how long that holds; kept by what holds the layers, or by the layer."""

    def __init__(
        self, owner: nn.Module, make: Callable[[nn.Module], AnyLayers | None], footprint: modes.Footprint
    ) -> None:
        """
        Args:
            owner: what keeps it.
            make: makes the layers of their owner; returns None if they cannot run as one call.
            footprint: of `owner`.
        """
        self.make = make
        self.layers = make(owner) if footprint.is_plain else None
        self._owner, self._footprint = weakref.ref(owner), footprint

    def is_for(self, owner: nn.Module) -> bool:
        """Whether it holds still, and not for a module that this one was copied from."""
        return self._owner() is owner and self._footprint.is_current()

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies have weights of their own


def run(owner: nn.Module, hidden: Tensor, batch: TokenBatch) -> Tensor | None:
    """The results of a layer, or of layers in turn, without dropout, head mask or probabilities, by one call.

    Args:
        owner: the layer, or what holds the layers. It has an attribute `prepared` for this function, and methods that
            return the parameters of each layer, or None: `native_parameters`, each with its native function, and
            `kernel_parameters`.
        hidden: `(tokens, hidden)`.
        batch: the tokens.

    Returns:
        `(tokens, hidden)`; None if a call would not give the numbers of the modules, or not sooner.
    """
    layers = _layers(owner, hidden) if modes.may_write(hidden) else None
    return None if layers is None else layers(hidden, batch.sequences)


def run_with_gradients(owner: nn.Module, hidden: Tensor, batch: TokenBatch, dropouts: LayerDropouts) -> Tensor | None:
    """The result of a layer as one function of autograd; None if it would not give the numbers of the modules.

    Args:
        owner, hidden, batch: as for `run`; `owner` is one layer.
        dropouts: the layer's.
    """
    plain = torch.is_grad_enabled() and modes.is_plain_call(hidden) and flags.read(flags.RECOMPUTE) == "0"
    layers = _layers(owner, hidden) if plain and _maker(hidden.device, hidden.dtype) is _kernel_layers else None
    if layers is None:
        return None
    return kernel_training.run(layers.layers[0], hidden, batch, dropouts)


def _layers(owner: nn.Module, hidden: Tensor) -> AnyLayers | None:
    """The layers of their owner, as they were prepared or are prepared now; None if they do not serve a call."""
    make = _maker(hidden.device, hidden.dtype)
    if make is None:
        return None
    prepared = owner.prepared
    if prepared is None or prepared.make is not make or not prepared.is_for(owner):
        prepared = Prepared(owner, make, modes.Footprint(owner))
        # Copies of weights would miss what changes in place.
        owner.prepared = None if prepared.layers is not None and prepared.layers.copied else prepared
    return prepared.layers if prepared.layers is not None and _serves(prepared.layers, hidden) else None


@flags.while_held
def _maker(device: torch.device, dtype: torch.dtype) -> Callable[[nn.Module], AnyLayers | None] | None:
    """What makes layers for a call, if every op inside a layer would run natively or by Triton, unverified."""
    if flags.read(flags.VERIFY) != "0":
        return None
    chosen = {choose(op, device, dtype) for op in ("attention", "bias_gelu", "add_norm")}
    if chosen == {"native"} and dtype == torch.float32:
        return _native_layers
    return _kernel_layers if chosen == {"triton"} else None


def _native_layers(owner: nn.Module) -> Layers | None:
    found = owner.native_parameters()
    functions = {function for function, _ in found or ()}
    return Layers([parameters for _, parameters in found], *functions) if len(functions) == 1 else None


def _kernel_layers(owner: nn.Module) -> KernelLayers | None:
    found = owner.kernel_parameters()
    places = {
        (tensor.dtype, tensor.device)
        for layer in found or ()
        for linear in (*layer.qkv, layer.out, layer.up, layer.down)
        for tensor in linear
    }
    return KernelLayers(found) if len(places) == 1 else None


def _serves(layers: AnyLayers, hidden: Tensor) -> bool:
    """Whether products would be native too: with packed weights at every length, in float32 for few tokens."""
    if isinstance(layers, KernelLayers):
        return layers.serves(hidden)
    if layers.function is packed.LAYERS:
        return multiplies_natively(hidden)
    return hidden.shape[0] <= MOST_TOKENS and matmul.library_of(matmul.FORWARD, hidden) == matmul.NATIVE
