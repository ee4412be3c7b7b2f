"""What native implementations have in common: functions of csrc/ called with the tensors' addresses."""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from .. import extension
from ..dropout import rescale, threshold
from .implementation import Implementation

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Fixed, so that the sums over tokens do not depend on the number of threads.
TOKENS_PER_CHUNK = 32

INT, FLOAT, ELEMENT = torch.int64, torch.float32, None

# The coordinates and the seed of an op's dropout.
DROPOUT = {"columns": (INT, "tokens"), "sequences": (INT, "tokens"), "seed": (INT, 1)}


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the libraries, and its structure of csrc/.

    Attributes:
        name: of the function.
        tensors: dtype, `ELEMENT` for that of the call, and shape of each tensor; the dimensions are among the sizes.
        written: the tensors that the function writes to.
        sizes, factors: names of the integers and of the floating-point numbers.
        optional: the tensors that may be None.
        strided: the tensors whose rows may lie apart, as a size of theirs says.
    """

    name: str
    tensors: dict[str, tuple]
    written: tuple[str, ...]
    sizes: str
    factors: str = ""
    optional: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()

    def __call__(self, device: torch.device, dtype: torch.dtype, **values: object) -> None:
        """Runs on the device's library, for elements of a dtype.

        Raises:
            ValueError: there is no such function for the dtype; or a tensor is missing, or is not what the function
                reads or writes: the message names it.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"{self.name} is for float32, float16 and bfloat16, not {dtype}; cast the tensors.")
        kept = []  # what is converted here must live until the function has run
        for name, (kind, *shape) in self.tensors.items():
            if values[name] is None and name in self.optional:
                continue
            wanted = tuple(map(values.get, shape, shape))
            tensor = self._checked(name, values[name], wanted, device, kind or dtype)
            kept.append(tensor)
            values[name] = tensor.data_ptr()
        run, structure = _linked(extension.load(device.type), self)
        with torch.cuda.device(device) if device.type == "cuda" else _HERE:
            error = run(structure(*self._in_order(values)), _DTYPES[dtype], _context(device))
        if error is not None:
            raise RuntimeError(f"{self.name} failed on {device}: {error.decode()}")

    def _checked(
        self, name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The tensor, or what it holds in another dtype or in memory that can be read by its address."""
        if tensor is None:
            raise ValueError(f"{self.name}: {name} is None, but the function needs it; pass a tensor.")
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{self.name}: {name} has shape {tuple(tensor.shape)} on {tensor.device}, but the other arguments "
                f"need {shape} on {device}."
            )
        in_memory = tensor.layout is torch.strided and (tensor.data_ptr() != 0 or tensor.numel() == 0)
        if in_memory and _is_laid_out(tensor, dtype, rows_apart=name in self.strided):
            return tensor
        if not in_memory or name in self.written or not torch.can_cast(tensor.dtype, dtype):
            raise ValueError(
                f"{self.name}: {name} is a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout}, which is not "
                f"what the function {'writes' if name in self.written else 'reads'}; pass a contiguous Tensor of "
                f"{dtype}."
            )
        return torch.empty(shape, dtype=dtype, device=device).copy_(tensor.detach())

    @functools.cached_property
    def fields(self) -> tuple[tuple[str, type], ...]:
        """The structure's fields in their order: addresses, integers, floating-point numbers."""
        kinds = (
            (ctypes.c_void_p, self.tensors),
            (ctypes.c_int64, self.sizes.split()),
            (ctypes.c_double, self.factors.split()),
        )
        return tuple((name, kind) for kind, names in kinds for name in names)

    @functools.cached_property
    def _in_order(self) -> Callable[[dict[str, object]], tuple]:
        """A structure's values, by name, in the order of its fields."""
        return itemgetter(*(name for name, _ in self.fields))


def _is_laid_out(tensor: Tensor, dtype: torch.dtype, rows_apart: bool) -> bool:
    """Whether csrc/ can use a tensor's memory: it holds elements of the dtype, in order, aligned and not negated."""
    return (
        tensor.dtype == dtype
        and (tensor.is_contiguous() or (rows_apart and tensor.stride(-1) == 1))
        and not tensor.is_neg()
        and tensor.data_ptr() % dtype.itemsize == 0
    )


@functools.cache
def _linked(library: ctypes.CDLL, function: Function) -> tuple[Callable[..., bytes | None], type[ctypes.Structure]]:
    """The function of a library, and the type of its argument.

    Threads that come here at once each link a function of their own: `getattr` would give them all the same one, which
    takes the argument of the last alone.
    """
    structure = type(function.name, (ctypes.Structure,), {"_fields_": function.fields})
    run = library[function.name]
    run.argtypes = (ctypes.POINTER(structure), ctypes.c_int, ctypes.c_void_p)
    run.restype = ctypes.c_char_p
    return run, structure


_HERE = contextlib.nullcontext()


def _context(device: torch.device) -> int:
    """What a library runs on: the current stream, or on the CPU torch's threads."""
    if device.type == "cuda":
        return torch.cuda.current_stream().cuda_stream
    return _parallel_for()


@functools.cache
def _parallel_for() -> int:
    library = next(Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*"))
    return ctypes.cast(ctypes.CDLL(str(library)).torch_parallel_for, ctypes.c_void_p).value


def dropout(columns: Tensor, sequences: Tensor, p: float, seed: Tensor | None) -> dict[str, object]:
    """The values of `DROPOUT`, and the sizes and factors that go with them."""
    return {"columns": columns, "sequences": sequences, **seed_and_rate(p, seed)}


def seed_and_rate(p: float, seed: Tensor | None) -> dict[str, object]:
    # p = 1 has the threshold 2^32, which no word of 32 bits can hold; its rescaling by 0 drops what is left.
    limits = {"threshold": min(threshold(p), 2**32 - 1), "rescale": rescale(p)}
    return {"seed": None if seed is None else seed.reshape(1), **limits}


def implementation(
    forward: Callable, backward: Callable, devices: tuple[str, ...], forward_in_place: Callable | None = None
) -> Implementation:
    """What a forward and a backward make that call the libraries of `devices`."""

    def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {dtype}; cast the model, or unset the flag."
        if device.type not in devices:
            return f"it runs on {' and '.join(devices)}, not on {device}; unset the flag."
        try:
            extension.load(device.type)
        except extension.BuildError as error:
            return str(error)
        return None

    def prepare(device: torch.device) -> None:
        if device.type in devices:
            extension.build([device.type])

    return Implementation(
        forward, backward, refuses, prepare=prepare, forward_in_place=forward_in_place, fuses_bias=True
    )
