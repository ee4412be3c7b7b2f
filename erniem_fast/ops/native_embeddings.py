"""The `native` implementation of `embeddings`."""

import mmap

import torch
from torch import Tensor

from .. import extension
from .native import DROPOUT, ELEMENT, FLOAT, INT, TOKENS_PER_CHUNK, Function, dropout, implementation

_LARGE = 1 << 24  # bytes of a table that is worth a mapping of its own

_FORWARD = Function(
    "embeddings_forward",
    {
        "ids": (INT, "tokens"),
        "positions": (INT, "tokens"),
        "word_table": (ELEMENT, "words", "hidden"),
        "position_table": (ELEMENT, "max_positions", "hidden"),
        "weight": (FLOAT, "hidden"),
        "norm_bias": (FLOAT, "hidden"),
        **DROPOUT,
        "out": (ELEMENT, "tokens", "hidden"),
        "z": (ELEMENT, "tokens", "hidden"),
    },
    written=("out", "z"),
    sizes="tokens words max_positions hidden threshold",
    factors="eps rescale",
    optional=("seed", "z"),
)

_BACKWARD = Function(
    "embeddings_backward",
    {
        "grad": (ELEMENT, "tokens", "hidden"),
        "z": (ELEMENT, "tokens", "hidden"),
        "weight": (FLOAT, "hidden"),
        **DROPOUT,
        "of_z": (FLOAT, "tokens", "hidden"),
        "of_norm": (FLOAT, "chunks", 2, "hidden"),
    },
    written=("of_z", "of_norm"),
    sizes="tokens chunks tokens_per_chunk hidden threshold",
    factors="eps rescale",
    optional=("seed",),
)

_SCATTER = Function(
    "embeddings_scatter",
    {
        "rows": (FLOAT, "tokens", "hidden"),
        "sorted": (INT, "tokens"),
        "order": (INT, "tokens"),
        "table": (ELEMENT, "table_rows", "hidden"),
    },
    written=("table",),
    sizes="tokens table_rows hidden padding_idx",
)


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
        **dropout(columns, sequences, p, seed),
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
    chunks = -(-tokens // TOKENS_PER_CHUNK)
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
        tokens_per_chunk=TOKENS_PER_CHUNK,
        hidden=hidden,
        eps=eps,
        **dropout(columns, sequences, p, seed),
    )
    of_words = of_z.to(z.dtype) if sparse else _scatter(of_z, ids, words, padding_idx, z.dtype)
    of_positions = _scatter(of_z, positions, max_positions, padding_idx, z.dtype)
    return of_words, of_positions, of_norm[:, 0].sum(0), of_norm[:, 1].sum(0)


def _scatter(rows: Tensor, index: Tensor, size: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a table, of which `index` says the row that each of the rows belongs to."""
    tokens, hidden = rows.shape
    table = _zeros(size, hidden, dtype, rows.device)
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


def _zeros(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of zeros.

    Of a large one on the CPU, pages where nothing is written never become memory: a batch has few of the vocabulary's
    words, and filling all of the word table's gradient (768 MB at base size, in fresh pages at every step) took 0.3 of
    a step's 3 seconds, and up to 1.3 where the pages had to come from a virtual machine's host.
    """
    size = rows * hidden * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(rows, hidden, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(rows, hidden)


NATIVE = implementation(_forward, _backward, extension.DEVICES)
