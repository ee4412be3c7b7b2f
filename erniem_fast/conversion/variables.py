"""Variables of PaddlePaddle 1: a folder (`params/`) with a file for each, as Baidu published ERNIE-M.

A file is: version, uint32; levels of LoD, uint64, each with its size, uint64, and that many bytes; version of the
tensor, uint32; size of its description, int32; the description, a protobuf of dtype (field 1) and dims (field 2); and
the numbers.
"""

import math
import os
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

# VarType.Type in Paddle's framework.proto.
_DTYPES = {
    0: torch.bool,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    20: torch.uint8,
    21: torch.int8,
    22: torch.bfloat16,
}

# What an optimizer leaves beside the parameters of a fine-tuned model.
_OPTIMIZER = ("_moment1_0", "_moment2_0", "_beta1_pow_acc_0", "_beta2_pow_acc_0")
_MASTER = ".master"  # the float32 copy of a parameter in float16


def read_variables(folder: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a folder, one after another; what an optimizer has left there is skipped.

    Raises:
        ValueError: a file is no variable of Paddle.
    """
    names = {name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))}
    for name in sorted(names):
        if not name.endswith(_OPTIMIZER) and name + _MASTER not in names:
            yield name.removesuffix(_MASTER), read_variable(os.path.join(folder, name))


def read_variable(path: str | os.PathLike) -> Tensor:
    """The tensor in a file.

    Raises:
        ValueError: the file is no variable of Paddle.
    """
    try:
        with open(path, "rb") as file:
            data = bytearray(file.read())  # torch wants memory that it may write
        offset = _end_of_lod(data)
        (size,) = struct.unpack_from("<i", data, offset + 4)
        start = offset + 8 + size
        dtype, shape = _described(bytes(data[offset + 8 : start]))
        if len(data) - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data) - start} bytes do not make {shape} of {dtype}")
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, offset=start).reshape(shape)
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ValueError(
            f"{str(path)!r} is not a variable of PaddlePaddle ({error}); copy it again, or remove it if it belongs to "
            f"something else."
        ) from error


def _end_of_lod(data: bytearray) -> int:
    """Where the tensor begins, behind the levels of detail, which no parameter has."""
    version, levels = struct.unpack_from("<IQ", data)
    if version != 0 or levels > 8:
        raise ValueError(f"version {version}, {levels} levels")
    offset = 12
    for _ in range(levels):
        offset += 8 + struct.unpack_from("<Q", data, offset)[0]
    return offset


def _described(description: bytes) -> tuple[torch.dtype, list[int]]:
    """The dtype and the shape in a TensorDesc. Its fields are varints; dims may come packed."""
    dtype, shape, place = None, [], 0
    while place < len(description):
        key, place = _varint(description, place)
        if key == 0x12:  # field 2, packed
            size, place = _varint(description, place)
            end = place + size
            while place < end:
                value, place = _varint(description, place)
                shape.append(value)
            continue
        value, place = _varint(description, place)
        if key == 0x08:
            dtype = _DTYPES[value]
        elif key == 0x10:
            shape.append(value)
        else:
            raise ValueError(f"field {key >> 3} is not a tensor's")
    if dtype is None:
        raise ValueError("no dtype")
    return dtype, shape


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
