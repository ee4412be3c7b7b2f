"""Who watches what a forward computes: graphs being made, transforms, autocast, and hooks on modules.

All private API of torch that this library reads is read here.
"""

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


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


def may_write(x: Tensor) -> bool:
    """Whether a product of `x` may be written into given memory: autograd, autocast and graphs want their own."""
    followed = torch.is_grad_enabled() or is_transformed() or is_recorded() or not has_values(x)
    return not (followed or torch.is_autocast_enabled(x.device.type))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does nothing but what its kind does, so that its parameters say it all."""
    if not is_untouched(module, kind):
        return False
    bias = getattr(module, "bias", None)
    return _is_dense(module.weight) and (bias is None or _is_dense(bias))


def _is_dense(parameter: object) -> bool:
    """Whether a parameter is numbers in memory and nothing else: there, and not quantised, sharded or sparse."""
    return type(parameter) in (nn.Parameter, Tensor) and parameter.layout is torch.strided


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs the forward of its kind and nothing else, so that other code can stand for it.

    Never in a graph that is made for elsewhere, where only the module's own operators are known.
    """
    return (
        not is_exported()
        and type(module) is kind
        and "forward" not in module.__dict__  # accelerate's offloading replaces it on the instance
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )
