"""The implementations that call csrc/, and when they serve."""

from collections.abc import Callable

import torch

from .. import flags
from ..native import build, library
from ..native.function import DTYPES
from .implementation import Implementation, choose


def implementation(
    forward: Callable, backward: Callable, devices: tuple[str, ...], forward_in_place: Callable | None = None
) -> Implementation:
    """The implementation of an op by functions that call the libraries of `devices`."""

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
        forward, backward, refuses, prepare=prepare, forward_in_place=forward_in_place, fuses_bias=True
    )


@flags.while_held
def serves_layers() -> bool:
    """Whether every op inside a layer would run natively on the CPU in float32, without the reference beside it."""
    ops = ("attention", "bias_gelu", "layernorm")
    return flags.read(flags.VERIFY) == "0" and all(
        choose(op, torch.device("cpu"), torch.float32) == "native" for op in ops
    )
