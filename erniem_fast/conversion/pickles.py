"""Paddle's pickles (`.pdparams`): read without executing what a file says, and written.

A pickle names functions, and unpickling calls them. `paddle.save` needs few: those that rebuild numpy's arrays. Only
these names are known here, and behind each stands a function of this module that checks its arguments, so that no
other code runs, numpy's parsing of dtypes and states included. All else is refused by its name.
"""

import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What `paddle.save` writes beside tensors: parameters' own names, and arrays that it has cut.
_NAMES, _CUT = "StructuredToParameterName@@", "UnpackBigParamInfor@@"

_REMEDY = "Get the file from its publisher; if you trust it, load it in Paddle and save model.state_dict() again."
_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "b1")
_BYTE_ORDERS = {"<": "<", "=": "<", "|": "|", ">": ">"}


class RefusedPickleError(pickle.UnpicklingError):
    """A pickle asks for what no checkpoint needs."""


def read_pickle(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a file that `paddle.save` wrote from a state dict, by their names.

    They use the memory that the file was read into; under protocols 2 and 3 the pickle's texts take as much again while
    it is read. uint16 means bfloat16, as in Paddle.

    Raises:
        RefusedPickleError: the file asks for a function or an object that no checkpoint needs.
        ValueError: the file is damaged, or holds something else than tensors by name.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()  # Python 2 wrote arrays as its strings
    except RefusedPickleError as error:
        raise RefusedPickleError(f"{str(path)!r} was not read: {error}. {_REMEDY}") from None
    except Exception as error:  # a damaged pickle can fail in any opcode
        raise ValueError(f"{str(path)!r} is not a whole .pdparams file ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{str(path)!r} holds data of type {type(content).__name__}, not tensors by name; save model.state_dict() "
            f"in Paddle."
        )
    return {name: _as_tensor(array) for name, array in _joined(_arrays(content, path), content, path)}


def write_pickle(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Writes tensors by name as `paddle.load` reads them; bfloat16 as uint16."""
    with open(path, "wb") as file:
        _Pickler(file, protocol=4).dump(
            {name: _as_array(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
        )


class _Pickler(pickle.Pickler):
    """Names no module that differs between versions of numpy, as numpy's own pickles do."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, value.tobytes())
        return NotImplemented


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _as_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _arrays(content: dict, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict. A value may be a pair of a parameter's name and its array."""
    arrays = {}
    for name, value in content.items():
        if name in (_NAMES, _CUT):
            continue
        value = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if not isinstance(value, _Array) or value.array is None:
            raise ValueError(
                f"{str(path)!r} holds data of type {type(value).__name__} by the name of {name!r}, not a tensor; "
                f"save the state_dict() of a model alone."
            )
        if not isinstance(name, str):
            raise ValueError(
                f"{str(path)!r} has a tensor by the name of {name!r}; save the state_dict() of a model alone."
            )
        arrays[name] = value.array
    return arrays


def _joined(arrays: dict[str, np.ndarray], content: dict, path: str | os.PathLike) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays, with those whole again that protocols 2 and 3 could not hold in one piece."""
    cuts = content.get(_CUT, {})
    if not isinstance(cuts, dict):
        raise ValueError(f"{str(path)!r} has {cuts!r:.40} as {_CUT!r}, not what Paddle cut into slices; copy it again.")
    for name, cut in cuts.items():
        try:
            parts = [arrays.pop(part) for part in cut["slices"]]
            yield name, np.concatenate(parts).reshape(cut["OriginShape"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} lacks parts of {name!r}, which Paddle cut into slices ({error}); copy it again."
            ) from error
    while arrays:
        yield arrays.popitem()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> "_Known":
        module = module.replace("__builtin__", "builtins")  # Python 2's name, which protocol 2 keeps
        known = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise RefusedPickleError(
                f"it asks for {module}.{name}, which no checkpoint needs and which may run code on this machine"
            )
        return known


class _Known:
    """A function by which a pickle may rebuild tensors; it cannot be changed by the pickle."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RefusedPickleError("it asks to change a function")

    def __setstate__(self, state: Any) -> None:
        self.__setattr__("state", state)


class _DType:
    """numpy's dtype in a pickle: made from its code, and given its byte order after that."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>=|") not in _DTYPES:
            raise RefusedPickleError(
                f"it holds an array of dtype {code!r}, and only numbers are read ({', '.join(_DTYPES)})"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if len(state) < 2 or state[1] not in _BYTE_ORDERS or any(part is not None for part in state[2:5]):
            raise RefusedPickleError(f"an array's dtype has the state {state!r}, which is no number's")
        self.dtype = self.dtype.newbyteorder(_BYTE_ORDERS[state[1]])


class _Array:
    """numpy's array in a pickle: made empty, and given its shape, dtype and bytes after that."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _from_bytes(data, dtype, shape, "F" if is_fortran else "C")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data
    dtype = dtype.dtype if isinstance(dtype, _DType) else _DType(dtype).dtype
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or not isinstance(data, (bytes, bytearray)) or math.prod(shape) * dtype.itemsize != len(data):
        raise RefusedPickleError(f"an array of shape {shape!r} and dtype {dtype} does not have the bytes for it")
    array = np.empty(0, dtype)
    # numpy's own way to use the bytes of a pickle as an array's memory, without a copy. It swaps bytes if it has to.
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _made(shape: Any, dtype: Any, data: Any, order: str = "C") -> _Array:
    made = _Array()
    made.array = _from_bytes(data, dtype, shape, order)
    return made


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _made(shape, dtype, data, order)


def _scalar(dtype: Any, data: Any) -> _Array:
    return _made((), dtype, data)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes under protocol 2."""
    if encoding != "latin1":
        raise RefusedPickleError(f"it encodes text as {encoding!r}, not as latin1")
    return text.encode("latin1")


def _value_of(*arguments: Any) -> Any:
    """Paddle's `eval("data", {"data": array})`, by which it saves tensors of static graphs; nothing is evaluated."""
    names = arguments[1] if len(arguments) == 2 and arguments[0] == "data" else None
    if not isinstance(names, dict) or not isinstance(names.get("data"), _Array):
        raise RefusedPickleError(f"it asks for builtins.eval of {arguments!r}, which may run code on this machine")
    return names["data"]


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Known(_Array),
    ("numpy.core.multiarray", "scalar"): _Known(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Known(_frombuffer),
    ("numpy", "ndarray"): _Known(_made),
    ("numpy", "dtype"): _Known(_DType),
    ("_codecs", "encode"): _Known(_encode),
    ("collections", "OrderedDict"): _Known(dict),
    ("builtins", "tuple"): _Known(tuple),
    ("builtins", "bytes"): _Known(lambda: b""),
    ("builtins", "eval"): _Known(_value_of),
}
