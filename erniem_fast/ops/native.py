"""The `native` implementation of an op: its functions in csrc/, if they are built."""

from types import ModuleType

import torch

from ..native import build, library
from ..native.function import DTYPES
from .choose import Implementation


def native_implementation(functions: ModuleType, devices: tuple[str, ...], saves: bool = True) -> Implementation:
    """The implementation by the functions of a module of `erniem_fast.native`.

    Args:
        functions: the module, with `forward`, `backward` and optionally `forward_in_place`.
        devices: the types of devices that the functions run on.
        saves: see `Implementation`.
    """

    def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"it serves float32, float16 and bfloat16, not {dtype}; cast the model, or unset the flag."
        if device.type not in devices:
            return f"it runs on {' and '.join(devices)}, not on {device}; unset the flag."
        try:
            library.load(device.type)
        except library.BuildError as error:
            return str(error)
        return None

    def prepare(device: torch.device) -> None:
        if device.type in devices:
            build.build([device.type])

    return Implementation(
        functions.forward,
        functions.backward,
        refuses,
        prepare,
        forward_in_place=getattr(functions, "forward_in_place", None),
        saves=saves,
        fuses_bias=True,
    )
