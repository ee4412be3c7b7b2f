"""The `triton` implementation of an op: its kernels, loaded at the first call that runs them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import inf

import torch
from torch import Tensor

from .choose import Implementation, Tensors, call_by_name
from .triton_interpreter import mended_bfloat16

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BFLOAT16_CAPABILITY = (8, 0)


def triton_implementation(kernels: str, largest: float = inf, capability: tuple[int, int] = (7, 5)) -> Implementation:
    """`forward` and `backward` of the module `erniem_fast.kernels.<kernels>`; arguments as for `served_by_triton`."""

    def direction(name: str) -> Callable[..., Tensors]:
        return lambda **values: call_by_name(getattr(import_module(f"erniem_fast.kernels.{kernels}"), name), values)

    kernels_of_module = Implementation(direction("forward"), direction("backward"), fuses_bias=True)
    return served_by_triton(kernels_of_module, largest, capability)


def served_by_triton(
    kernels: Implementation, largest: float = inf, capability: tuple[int, int] = (7, 5)
) -> Implementation:
    """An implementation that launches Triton kernels, on the devices that can run them.

    Args:
        kernels: its two directions.
        largest: the largest size that they serve, see `choose`.
        capability: the least compute capability of an NVIDIA GPU that they serve.
    """

    def on_device(direction: Callable[..., Tensors]) -> Callable[..., Tensors]:
        def run(**values: object) -> Tensors:
            device = next(each.device for each in values.values() if isinstance(each, Tensor))
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device(device) if device.type == "cuda" else mended_bfloat16():
                return call_by_name(direction, values)

        return run

    return replace(
        kernels,
        forward=on_device(kernels.forward),
        backward=on_device(kernels.backward),
        refuses=partial(_refuses, capability),
        automatic=_on_gpu,
        largest=largest,
    )


def _on_gpu(device: torch.device) -> bool:
    """Only on GPUs: the interpreter is for checking, never for speed."""
    return device.type == "cuda"


def _refuses(capability: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve a device and dtype, with the remedy; None where they can."""
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
