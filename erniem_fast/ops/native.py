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
        sizes, factors: names of the integers and of the floating-point numbers.
        strided: the tensors whose rows may lie apart, as a size of theirs says.
    """

    name: str
    tensors: dict[str, tuple]
    sizes: str
    factors: str = ""
    strided: tuple[str, ...] = ()

    def __call__(self, device: torch.device, dtype: torch.dtype, **values: object) -> None:
        """Runs on the device's library, for elements of a dtype. No tensor gets by whose shape is not what it says."""
        kept = []  # what is converted here must live until the function has run
        for name, (kind, *shape) in self.tensors.items():
            tensor = values[name]
            if tensor is not None:
                wanted = tuple(map(values.get, shape, shape))
                if tensor.shape != wanted or tensor.device != device:
                    raise ValueError(
                        f"{self.name}: {name} has shape {tuple(tensor.shape)} on {tensor.device}, but the other "
                        f"arguments need {wanted} on {device}."
                    )
                if name not in self.strided:
                    tensor = tensor.to(kind or dtype).contiguous()
                    kept.append(tensor)
                values[name] = tensor.data_ptr()
        run, structure = _linked(extension.load(device.type), self)
        with torch.cuda.device(device) if device.type == "cuda" else _HERE:
            error = run(structure(*self._in_order(values)), _DTYPES[dtype], _context(device))
        if error is not None:
            raise RuntimeError(f"{self.name} failed on {device}: {error.decode()}")

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
