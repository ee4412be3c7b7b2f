"""The `native` implementation of `embeddings`: csrc/ called with the tensors' addresses."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import extension
from ..dropout import rescale, threshold
from .implementation import Implementation

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Fixed, so that the sums over tokens do not depend on the number of threads.
_TOKENS_PER_CHUNK = 32

_INT, _FLOAT, _ELEMENT = torch.int64, torch.float32, None


@dataclass(frozen=True)
class _Function:
    """A function of the libraries, and its structure of csrc/embeddings.h.

    Attributes:
        name: of the function.
        tensors: dtype, `_ELEMENT` for that of the call, and shape of each tensor; the dimensions are among the sizes.
        sizes, factors: names of the integers and of the floating-point numbers.
    """

    name: str
    tensors: dict[str, tuple]
    sizes: str
    factors: str = ""

    @functools.cached_property
    def structure(self) -> type[ctypes.Structure]:
        kinds = (
            (ctypes.c_void_p, self.tensors),
            (ctypes.c_int64, self.sizes.split()),
            (ctypes.c_double, self.factors.split()),
        )
        fields = [(name, kind) for kind, names in kinds for name in names]
        return type(self.name, (ctypes.Structure,), {"_fields_": fields})

    def __call__(self, device: torch.device, dtype: torch.dtype, **values: object) -> None:
        """Runs on the device's library, for elements of a dtype. No tensor gets by whose shape is not what it says."""
        for name, (kind, *shape) in self.tensors.items():
            if values[name] is not None:
                expected = tuple(values.get(size, size) for size in shape)
                values[name] = self._checked(name, values[name], device, kind or dtype, expected)
        addresses = {name: each.data_ptr() if isinstance(each, Tensor) else each for name, each in values.items()}
        run = getattr(extension.load(device.type), self.name)
        run.argtypes, run.restype = (ctypes.POINTER(self.structure), ctypes.c_int, ctypes.c_void_p), ctypes.c_char_p
        with torch.cuda.device(device if device.type == "cuda" else -1):
            error = run(self.structure(**addresses), _DTYPES[dtype], _context(device))
        if error is not None:
            raise RuntimeError(f"{self.name} failed on {device}: {error.decode()}")

    def _checked(
        self, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{self.name}: {name} has shape {tuple(tensor.shape)} on {tensor.device}, but the other arguments need "
                f"{shape} on {device}."
            )
        return tensor.to(dtype).contiguous()


_DROPOUT = {"columns": (_INT, "tokens"), "sequences": (_INT, "tokens"), "seed": (_INT, 1)}

_FORWARD = _Function(
    "embeddings_forward",
    {
        "ids": (_INT, "tokens"),
        "positions": (_INT, "tokens"),
        "word_table": (_ELEMENT, "words", "hidden"),
        "position_table": (_ELEMENT, "max_positions", "hidden"),
        "weight": (_FLOAT, "hidden"),
        "norm_bias": (_FLOAT, "hidden"),
        **_DROPOUT,
        "out": (_ELEMENT, "tokens", "hidden"),
        "z": (_ELEMENT, "tokens", "hidden"),
    },
    sizes="tokens words max_positions hidden threshold",
    factors="eps rescale",
)

_BACKWARD = _Function(
    "embeddings_backward",
    {
        "grad": (_ELEMENT, "tokens", "hidden"),
        "z": (_ELEMENT, "tokens", "hidden"),
        "weight": (_FLOAT, "hidden"),
        **_DROPOUT,
        "of_z": (_FLOAT, "tokens", "hidden"),
        "of_norm": (_FLOAT, "chunks", 2, "hidden"),
    },
    sizes="tokens chunks tokens_per_chunk hidden threshold",
    factors="eps rescale",
)

_SCATTER = _Function(
    "embeddings_scatter",
    {
        "rows": (_FLOAT, "tokens", "hidden"),
        "sorted": (_INT, "tokens"),
        "order": (_INT, "tokens"),
        "table": (_ELEMENT, "table_rows", "hidden"),
    },
    sizes="tokens table_rows hidden padding_idx",
)


def _context(device: torch.device) -> int:
    """What a library runs on: the current stream, or on the CPU torch's threads."""
    if device.type == "cuda":
        return torch.cuda.current_stream().cuda_stream
    return _parallel_for()


@functools.cache
def _parallel_for() -> int:
    library = next(Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*"))
    return ctypes.cast(ctypes.CDLL(str(library)).torch_parallel_for, ctypes.c_void_p).value


def _dropout(columns: Tensor, sequences: Tensor, p: float, seed: Tensor | None) -> dict[str, object]:
    # p = 1 has the threshold 2^32, which no word of 32 bits can hold; its rescaling by 0 drops what is left.
    limits = {"threshold": min(threshold(p), 2**32 - 1), "rescale": rescale(p)}
    return {"columns": columns, "sequences": sequences, "seed": None if seed is None else seed.reshape(1), **limits}


def _forward(
    ids, positions, word_table, position_table, weight, norm_bias, eps, padding_idx, columns, sequences, p, seed, save
):
    if ids.device.type == "cpu":
        # On other devices a check would be a synchronisation; there the result has NaN for these tokens.
        _check_range("ids", ids, word_table.shape[0], columns, sequences)
        _check_range("positions", positions, position_table.shape[0], columns, sequences)
    tokens, (words, hidden) = ids.shape[0], word_table.shape
    out = word_table.new_empty(tokens, hidden)
    z = torch.empty_like(out) if save else None
    _FORWARD(
        out.device,
        out.dtype,
        ids=ids,
        positions=positions,
        word_table=word_table,
        position_table=position_table,
        weight=weight,
        norm_bias=norm_bias,
        out=out,
        z=z,
        tokens=tokens,
        words=words,
        max_positions=position_table.shape[0],
        hidden=hidden,
        eps=eps,
        **_dropout(columns, sequences, p, seed),
    )
    return out, out.new_empty(0) if z is None else z


def _check_range(name: str, rows: Tensor, size: int, columns: Tensor, sequences: Tensor) -> None:
    bad = (rows < 0) | (rows >= size)
    if bad.any():
        token = int(bad.nonzero()[0])
        place = f"row {int(sequences[token])}, column {int(columns[token])}"
        raise IndexError(
            f"{name} has {int(rows[token])} at {place}, but its table has {size} rows; use values in [0, {size})."
        )


def _backward(
    grad, z, ids, positions, words, max_positions, weight, eps, padding_idx, columns, sequences, p, seed, sparse
):
    tokens, hidden = z.shape
    chunks = -(-tokens // _TOKENS_PER_CHUNK)
    of_z = z.new_empty(z.shape, dtype=torch.float32)
    of_norm = of_z.new_empty(chunks, 2, hidden)
    _BACKWARD(
        z.device,
        z.dtype,
        grad=grad,
        z=z,
        weight=weight,
        of_z=of_z,
        of_norm=of_norm,
        tokens=tokens,
        chunks=chunks,
        tokens_per_chunk=_TOKENS_PER_CHUNK,
        hidden=hidden,
        eps=eps,
        **_dropout(columns, sequences, p, seed),
    )
    of_words = of_z.to(z.dtype) if sparse else _scatter(of_z, ids, words, padding_idx, z.dtype)
    of_positions = _scatter(of_z, positions, max_positions, padding_idx, z.dtype)
    return of_words, of_positions, of_norm[:, 0].sum(0), of_norm[:, 1].sum(0)


def _scatter(rows: Tensor, index: Tensor, size: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a table, of which `index` says the row that each of the rows belongs to."""
    tokens, hidden = rows.shape
    table = rows.new_zeros(size, hidden, dtype=dtype)
    ascending, order = torch.sort(index, stable=True)
    _SCATTER(
        table.device,
        dtype,
        rows=rows,
        sorted=ascending,
        order=order,
        table=table,
        tokens=tokens,
        table_rows=size,
        hidden=hidden,
        padding_idx=padding_idx,
    )
    return table


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"it serves float32, float16 and bfloat16, not {dtype}; cast the model, or unset the flag."
    if device.type not in extension.DEVICES:
        return f"it runs on {' and '.join(extension.DEVICES)}, not on {device}; unset the flag."
    try:
        extension.load(device.type)
    except extension.BuildError as error:
        return str(error)
    return None


def _prepare(device: torch.device) -> None:
    if device.type in extension.DEVICES:
        extension.build([device.type])


NATIVE = Implementation(_forward, _backward, _refuses, prepare=_prepare)
