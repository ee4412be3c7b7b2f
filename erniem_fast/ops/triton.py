"""The `triton` implementation of an op: its kernels, loaded at the first call that runs them."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import inf

import torch

from .implementation import Implementation
from .triton_interpreter import mended_bfloat16

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BFLOAT16_CAPABILITY = (8, 0)


def implementation(kernels: str, largest: float = inf, capability: tuple[int, int] = (7, 5)) -> Implementation:
    """What `forward` and `backward` of the module `erniem_fast.kernels.<kernels>` make; arguments as for `served`."""

    def direction(name):
        return lambda *inputs: getattr(import_module(f"erniem_fast.kernels.{kernels}"), name)(*inputs)

    return served(Implementation(direction("forward"), direction("backward"), fuses_bias=True), largest, capability)


def served(kernels: Implementation, largest: float = inf, capability: tuple[int, int] = (7, 5)) -> Implementation:
    """An implementation that launches Triton kernels, where they can be launched.

    Args:
        kernels: its two directions.
        largest: the largest size that they serve, see `choose`.
        capability: the least compute capability of an NVIDIA GPU that they serve.
    """

    def on_device(direction):
        def run(*inputs):
            device = inputs[0].device
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device(device) if device.type == "cuda" else mended_bfloat16():
                return direction(*inputs)

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
