"""Who follows what a forward computes: the makers of graphs, and the transforms of torch.func and forward-mode AD."""

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD follows what is computed now: they know PyTorch's own operators alone."""
    if torch.compiler.is_compiling():
        return False
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_mapped(value: Tensor) -> bool:
    """Whether torch.vmap maps over a tensor, which another transform may have wrapped."""
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds values: a fake one and those on the meta device have a shape and a dtype alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_recorded() -> bool:
    """Whether a graph is being made, to be run here (torch.compile) or elsewhere: values cannot be read on the host."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether a graph is being made for elsewhere, by torch.jit.trace, torch.export or torch.onnx.export.

    It is to run where this library is not, for any sizes and masks: it may hold PyTorch's own operators alone, and
    nothing that was read from the example's values.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
