"""Launches that take the host half as long as Triton's, where a kernel was launched with such arguments before.

For each launch, Triton inspects all arguments and looks up the compiled kernel: 9 us on a Zen 4, where this takes 5.
With few tokens, the GPU waits for the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_ALIGNMENT = 16  # bytes: a kernel is compiled for pointers that are multiples of it, and once more for others
_INT32_END = 2**31  # a kernel is compiled for integers of 32 bits, and once more for larger ones


class _Places(NamedTuple):
    """The positions of a kernel's arguments: tensors or None, integers, floats, and constants.

    If a float is passed as an integer, Triton compiles a kernel for that value alone.
    """

    pointers: list[int]
    integers: list[int]
    floats: list[int]
    constants: list[int]


_places: dict[Callable[..., None], _Places] = {}  # by the function that a kernel was made of

# By the kernel, the device and all else that Triton compiles kernels for: types, values of constants, and options.
_compiled: dict[tuple, Callable[..., object]] = {}


def launch(kernel: JITFunction, grid: tuple[int, ...], *arguments: object, **options: int) -> None:
    """Runs `kernel[grid](*arguments, **options)`.

    Args:
        kernel: whose parameters for tensors end in `_ptr`, and which is specialized on no integer.
        grid: the numbers of programs along up to three axes.
        arguments: all of the kernel's, in order; the first one is a tensor.
        options: Triton's, such as `num_warps`.
    """
    key = _key(kernel, arguments, options) if _is_served(kernel, arguments[0]) else None
    if key is None:
        kernel[grid](*arguments, **options)
    elif key in _compiled:
        _compiled[key][(*grid, 1, 1)[:3]](*arguments)
    else:
        _compiled[key] = kernel[grid](*arguments, **options)


def _is_served(kernel: object, tensor: Tensor) -> bool:
    """Whether launches are remembered: not of interpreted kernels, nor on AMD's GPUs, where sizes of tensors count."""
    return tensor.is_cuda and torch.version.hip is None and isinstance(kernel, JITFunction)


def _key(kernel: JITFunction, arguments: tuple, options: dict[str, int]) -> tuple | None:
    """All that decides which compiled kernel runs; None for rare arguments, which are left to Triton."""
    places = _places.get(kernel.fn) or _find_places(kernel)
    addresses, types = 0, []
    for place in places.pointers:
        pointer = arguments[place]
        if pointer is None:
            types.append(None)
        else:
            addresses |= pointer.data_ptr()
            types.append(pointer.dtype)
    if addresses % _ALIGNMENT or max([arguments[place] for place in places.integers]) >= _INT32_END:
        return None
    for place in places.floats:
        if type(arguments[place]) is not float:
            return None
    constants = [arguments[place] for place in places.constants]
    return kernel.fn, arguments[0].get_device(), *types, *constants, *options.values()


def _find_places(kernel: JITFunction) -> _Places:
    places = _Places([], [], [], [])
    for parameter in kernel.params:
        if parameter.is_constexpr:
            kind = places.constants
        elif parameter.name.endswith("_ptr"):
            kind = places.pointers
        else:
            kind = places.integers if parameter.do_not_specialize else places.floats
        kind.append(parameter.num)
    _places[kernel.fn] = places
    return places
