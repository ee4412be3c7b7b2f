"""The `triton` implementation of an op: its kernels, loaded at the first call that runs them."""

from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from math import inf

import torch

from .implementation import Implementation

_CAPABILITIES = {torch.float16: (7, 5), torch.bfloat16: (8, 0), torch.float32: (7, 5)}


def implementation(kernels: str, largest: float = inf) -> Implementation:
    """What `forward` and `backward` of the module `erniem_fast.kernels.<kernels>` make, up to a size of `largest`."""

    def direction(name):
        def run(*inputs):
            device = inputs[0].device
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return getattr(import_module(f"erniem_fast.kernels.{kernels}"), name)(*inputs)

        return run

    return Implementation(
        direction("forward"), direction("backward"), _refuses, fuses_bias=True, automatic=_on_gpu, largest=largest
    )


def _on_gpu(device: torch.device) -> bool:
    """Only on GPUs: the interpreter is for checking, never for speed."""
    return device.type == "cuda"


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve a device and dtype, with the remedy; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (on Linux), or choose `torch`."
    if dtype not in _CAPABILITIES:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}; choose `torch`."
    if device.type != "cuda":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return (
            f"Triton has no kernels for {device.type}; move the model to a GPU, choose `torch`, or set "
            "TRITON_INTERPRET=1 before Python starts to check the kernels in Triton's interpreter."
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _CAPABILITIES[dtype]:
        least = ".".join(map(str, _CAPABILITIES[dtype]))
        return f"{dtype} needs compute capability {least} or above; choose `torch` or another dtype."
    return None
