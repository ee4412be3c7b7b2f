"""The `triton` implementation of an op: its kernels, imported by the first call that runs them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import inf

import torch
from torch import Tensor

from .choose import Implementation, Tensors, arguments_of
from .triton_interpreter import mended_floats

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (7, 5)
_BFLOAT16_CAPABILITY = (8, 0)


def triton_implementation(
    kernels: str, largest: float = inf, capability: tuple[int, int] = _LEAST_CAPABILITY
) -> Implementation:
    """The implementation by `forward` and `backward` of the module `erniem_fast.kernels.<kernels>`.

    Args:
        kernels: the module's name.
        largest: the largest size that the kernels serve; see `choose`.
        capability: the lowest compute capability of NVIDIA GPUs that they serve.
    """
    forward, backward = (triton_function(kernels, name) for name in ("forward", "backward"))
    refuses = partial(_refuses, capability)
    return Implementation(forward, backward, refuses, automatic=on_gpu, largest=largest, fuses_bias=True)


def served_by_triton(implementation: Implementation) -> Implementation:
    """The implementation, which launches Triton kernels among other things, for the devices that can run these."""
    forward, backward = (
        _launching(lambda function=function: function) for function in (implementation.forward, implementation.backward)
    )
    refuses = partial(_refuses, _LEAST_CAPABILITY)
    return replace(implementation, forward=forward, backward=backward, refuses=refuses, automatic=on_gpu)


def triton_function(kernels: str, name: str) -> Callable[..., Tensors]:
    """A function of the module `erniem_fast.kernels.<kernels>`, to be called by keywords on any device."""
    return _launching(partial(_kernels, kernels, name))


def refuses_16_bits(device: torch.device) -> str | None:
    """Why kernels cannot serve all dtypes on a device, with the remedy; None if they can."""
    return _refuses(_BFLOAT16_CAPABILITY, device, torch.bfloat16)


def _kernels(module: str, name: str) -> Callable[..., Tensors]:
    return getattr(import_module(f"erniem_fast.kernels.{module}"), name)


def _launching(load: Callable[[], Callable[..., Tensors]]) -> Callable[..., Tensors]:
    def run(**values: object) -> Tensors:
        function = load()
        device = next(each.device for each in values.values() if isinstance(each, Tensor))
        with on_device(device):
            return function(**arguments_of(function, values))

    return run


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """What kernels run in: Triton launches on the current device, which may not be the tensors'."""
    if device.type != "cuda":
        return mended_floats()
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def on_gpu(device: torch.device) -> bool:
    """`auto` takes Triton on GPUs only: the interpreter is for checking kernels and slow."""
    return device.type == "cuda"


def _refuses(capability: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve a device and dtype, with the remedy; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (on Linux), or choose `torch`."
    if dtype not in _DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}; choose `torch`."
    if device.type != "cuda":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return (
            f"Triton has no kernels for {device.type}; move the model to a GPU, choose `torch`, or set "
            "TRITON_INTERPRET=1 before Python starts to check the kernels in Triton's interpreter."
        )
    least = max(capability, _BFLOAT16_CAPABILITY) if dtype == torch.bfloat16 else capability
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < least:
        return f"for {dtype} the kernels need compute capability {least[0]}.{least[1]} or above; choose `torch`."
    return None
