"""The structures of csrc/, filled with the addresses of checked tensors, and the functions that take them."""

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import Dropout, rescale, threshold
from ..reference import Norm
from . import library

# The dtypes of elements, with their numbers in `Dtype` of csrc/elements.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# On a CPU. Fixed, so that the sums over tokens do not depend on the number of threads.
TOKENS_PER_CHUNK = 32

INT, FLOAT, ELEMENT = torch.int64, torch.float32, None

# The tensors of an op's dropout. Without a seed there is no dropout, and the coordinates are not read.
DROPOUT = {"columns": (INT, "tokens"), "sequence_ids": (INT, "tokens"), "seed": (INT, 1)}
_READ_WITH = {"columns": "seed", "sequence_ids": "seed"}


def dropout_values(dropout: Dropout | None) -> dict[str, object]:
    """The values of `DROPOUT`, `threshold` and `rescale`, by name."""
    if dropout is None:
        return {"columns": None, "sequence_ids": None, "seed": None, "threshold": 0, "rescale": 1.0}
    return {
        "columns": dropout.columns,
        "sequence_ids": dropout.sequence_ids,
        "seed": dropout.seed.reshape(1),
        # At p = 1 the threshold, 2^32, does not fit 32 bits. One less would keep a few elements, but their factor is 0.
        "threshold": min(threshold(dropout.p), 2**32 - 1),
        "rescale": rescale(dropout.p),
    }


def norm_values(norm: Norm) -> dict[str, object]:
    """The parameters of a layer norm, by the names of the structures' fields."""
    return {"weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


def chunks_of(tokens: int, tokens_per_chunk: int = TOKENS_PER_CHUNK) -> int:
    """The number of chunks of so many tokens; each chunk has its own row in the sums over tokens."""
    return -(-tokens // tokens_per_chunk)


# `chunks_of` as a dimension of a `Function`'s tensor.
CHUNKS = "-(-tokens // tokens_per_chunk)"


class Filled(NamedTuple):
    """A structure of csrc/ with its values.

    Attributes:
        structure: the structure.
        tensors: those whose addresses it holds.
        copied: whether some of them are copies of the tensors that came, so that they miss later changes.
    """

    structure: ctypes.Structure
    tensors: list[Tensor]
    copied: bool


@dataclass(frozen=True, eq=False)
class Structure:
    """A structure of csrc/: addresses of tensors, and numbers.

    A tensor's dimension is a number, a name, or an expression in names. The first tensor with a name decides the size;
    all other tensors must agree, and so must the expressions. So callers pass only those integers that are not in the
    shape of a tensor.

    Attributes:
        name: what errors call it.
        tensors: for each tensor its dtype (`ELEMENT` for the dtype of the call) and its dimensions.
        sizes, factors: the names of the integers and of the floating-point numbers, separated by spaces.
        written: the tensors that are written to.
        optional: the tensors that may be None or left out of a call.
        strided: the tensors with rows that need not be adjacent in memory.
    """

    name: str
    tensors: dict[str, tuple]
    sizes: str
    factors: str = ""
    written: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()

    def fill(self, device: torch.device, dtype: torch.dtype, **values: object) -> Filled:
        """The structure with these values.

        Args:
            device: where all tensors are.
            dtype: of the elements, a key of `DTYPES`.
            values: the tensors and numbers, by name.

        Raises:
            ValueError: the dtype is not in `DTYPES`; or a tensor is missing, contradicts another one, or cannot be read
                or written by csrc/. The message names the tensor.
        """
        if dtype not in DTYPES:
            raise ValueError(f"{self.name} is for float32, float16 and bfloat16, not {dtype}; cast the tensors.")
        addresses, tensors, copied = [], [], False
        values.update(self._constants)
        for name, kind, dimensions in self._described:
            tensor = values.get(name)
            if tensor is None:
                addresses.append(self._absent(name, values))
                continue
            shape = tensor.shape
            if len(shape) != len(dimensions) or tensor.device != device:
                raise self._contradiction(name, values, device)
            for dimension, size in zip(dimensions, shape, strict=True):
                if values.setdefault(dimension, size) != size:
                    raise self._contradiction(name, values, device)
            readable = self._readable(name, tensor, kind or dtype)
            copied = copied or readable is not tensor
            tensors.append(readable)
            addresses.append(readable.data_ptr())
        for expression, code, name in self._expressions:
            if expression in values and values[expression] != (value := eval(code, None, values)):
                raise self._contradiction(name, {**values, expression: value}, device)
        return Filled(self.layout(*addresses, *map(values.__getitem__, self._numbers)), tensors, copied)

    def _absent(self, name: str, values: dict[str, object]) -> None:
        """The null address of a missing tensor; raises an error if the function needs the tensor."""
        if name not in self.optional or values.get(_READ_WITH.get(name, name)) is not None:
            raise ValueError(f"{self.name}: {name} is None, but the function needs it; pass a tensor.")

    def _contradiction(self, name: str, values: dict[str, object], device: torch.device) -> ValueError:
        """The error for a tensor that contradicts others: it names the tensor, the shape it needs, and why."""
        tensor, (_, *dimensions) = values[name], self.tensors[name]
        sizes = [str(values.get(dimension, dimension)) for dimension in dimensions]
        wanted = ", ".join(sizes) + ("," if len(sizes) == 1 else "")
        texts = [dimension for dimension in dimensions if isinstance(dimension, str)]
        given = [other for other in self.tensors if values.get(other) is not None]
        reasons = []
        for dimension in dict.fromkeys([*texts, *re.findall("[a-z_]+", " ".join(texts))]):
            source = next((other for other in given if dimension in self.tensors[other]), None)
            if dimension in values and source != name:
                reason = f", as {source} has shape {tuple(values[source].shape)}" if source else ""
                reasons.append(f"{dimension} is {values[dimension]}{reason}")
        return ValueError(
            f"{self.name}: {name} has shape {tuple(tensor.shape)} on {tensor.device}, but needs ({wanted}) on {device}"
            f"{': ' if reasons else ''}{'; '.join(reasons)}."
        )

    def _readable(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, or a copy of it that has the dtype and that csrc/ can read by its address."""
        in_memory = tensor.layout is torch.strided and (tensor.data_ptr() != 0 or tensor.numel() == 0)
        if in_memory and _is_laid_out(tensor, dtype, rows_apart=name in self.strided):
            return tensor
        if not in_memory or name in self.written or not torch.can_cast(tensor.dtype, dtype):
            raise ValueError(
                f"{self.name}: {name} is of type {type(tensor).__name__}, {tensor.dtype} and {tensor.layout}, which is "
                f"not what the function {'writes' if name in self.written else 'reads'}; pass a contiguous Tensor of "
                f"{dtype}."
            )
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor.detach())

    @functools.cached_property
    def layout(self) -> type[ctypes.Structure]:
        """The structure as a type of ctypes."""
        return type(self.name, (ctypes.Structure,), {"_fields_": self.fields})

    @functools.cached_property
    def fields(self) -> tuple[tuple[str, type], ...]:
        """The structure's fields in order: addresses, integers, floating-point numbers."""
        kinds = (
            (ctypes.c_void_p, self.tensors),
            (ctypes.c_int64, self.sizes.split()),
            (ctypes.c_double, self.factors.split()),
        )
        return tuple((name, kind) for kind, names in kinds for name in names)

    @functools.cached_property
    def _described(self) -> list[tuple[str, torch.dtype | None, tuple]]:
        """The name, dtype and dimensions of each tensor."""
        return [(name, kind, tuple(dimensions)) for name, (kind, *dimensions) in self.tensors.items()]

    @functools.cached_property
    def _constants(self) -> dict[int, int]:
        """The dimensions that are numbers, each with itself as its size."""
        return {size: size for _, _, dimensions in self._described for size in dimensions if isinstance(size, int)}

    @functools.cached_property
    def _expressions(self) -> list[tuple[str, CodeType, str]]:
        """Each dimension that is an expression, compiled, and the first tensor that has it."""
        found = {}
        for name, _, dimensions in self._described:
            for text in dimensions:
                if isinstance(text, str) and not text.isidentifier():
                    found.setdefault(text, (text, compile(text, self.name, "eval"), name))
        return list(found.values())

    @functools.cached_property
    def _numbers(self) -> list[str]:
        """The names of the structure's numbers, in the order of its fields."""
        return [*self.sizes.split(), *self.factors.split()]


@dataclass(frozen=True, eq=False)
class Function(Structure):
    """A function of the libraries, and the structure that is its argument."""

    def __call__(self, device: torch.device, dtype: torch.dtype, **values: object) -> None:
        """Runs the function of the device's library.

        Args:
            device, dtype, values: see `fill`.

        Raises:
            ValueError: see `fill`.
            BuildError: the library is not built or cannot be loaded.
            RuntimeError: the function failed; the message says why.
        """
        filled = self.fill(device, dtype, **values)
        run = _linked(library.load(device.type), self.name)
        with torch.cuda.device(device) if device.type == "cuda" else _HERE:
            error = run(ctypes.byref(filled.structure), DTYPES[dtype], _context(device))
        if error is not None:
            raise RuntimeError(f"{self.name} failed on {device}: {error.decode()}")


def _is_laid_out(tensor: Tensor, dtype: torch.dtype, rows_apart: bool) -> bool:
    """Whether csrc/ can use a tensor's memory: it holds the dtype's elements in order, aligned, not lazily negated."""
    return (
        tensor.dtype == dtype
        and (tensor.is_contiguous() or (rows_apart and tensor.stride(-1) == 1))
        and not tensor.is_neg()
        and tensor.data_ptr() % dtype.itemsize == 0
    )


@functools.cache
def _linked(library: ctypes.CDLL, name: str) -> Callable[..., bytes | None]:
    """A function of the library, which takes the address of its structure, the dtype's number and what it runs on."""
    run = library[name]
    run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    run.restype = ctypes.c_char_p
    return run


_HERE = contextlib.nullcontext()


def _context(device: torch.device) -> int:
    """The address of what a function runs on: the current CUDA stream, or on the CPU `torch_parallel_for`."""
    if device.type == "cuda":
        return torch.cuda.current_stream().cuda_stream
    return _parallel_for()


@functools.cache
def _parallel_for() -> int:
    library = next(Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*"))
    return ctypes.cast(ctypes.CDLL(str(library)).torch_parallel_for, ctypes.c_void_p).value
