"""`embeddings` on the CPU and on CUDA devices."""

import mmap
from dataclasses import replace

import torch
from torch import Tensor

from ..dropout import Dropout
from ..reference import Norm, NormScale
from .function import (
    CHUNKS,
    DROPOUT,
    ELEMENT,
    FLOAT,
    INT,
    TOKENS_PER_CHUNK,
    Function,
    chunks_of,
    dropout_values,
    norm_values,
)

_LARGE = 1 << 24  # bytes from which a table gets its own memory mapping
_FEWEST_TOKENS = 4  # of a chunk on CUDA; with fewer, the chunks' sums would be most of what is written

_FORWARD = Function(
    "embeddings_forward",
    {
        "ids": (INT, "tokens"),
        "positions": (INT, "tokens"),
        "word_table": (ELEMENT, "words", "hidden"),
        "word_scale": (FLOAT, "words"),
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
    optional=("word_scale", *DROPOUT, "z"),
)

# Of a model in float32 with a word table in bfloat16, and in int8.
_BFLOAT16_FORWARD, _INT8_FORWARD = (
    replace(
        _FORWARD,
        name=f"embeddings_{name}_forward",
        tensors={**_FORWARD.tensors, "word_table": (dtype, "words", "hidden")},
        optional=(*optional, *DROPOUT, "z"),
    )
    for name, dtype, optional in (("bfloat16", torch.bfloat16, ("word_scale",)), ("int8", torch.int8, ()))
)
_BACKWARD = Function(
    "embeddings_backward",
    {
        "grad": (ELEMENT, "tokens", "hidden"),
        "z": (ELEMENT, "tokens", "hidden"),
        "weight": (FLOAT, "hidden"),
        **DROPOUT,
        "grad_z": (ELEMENT, "tokens", "hidden"),
        "grad_norm": (FLOAT, CHUNKS, 2, "hidden"),
    },
    written=("grad_z", "grad_norm"),
    sizes="tokens tokens_per_chunk hidden threshold",
    factors="eps rescale",
    optional=(*DROPOUT,),
)

_SCATTER = Function(
    "embeddings_scatter",
    {
        "rows": (ELEMENT, "tokens", "hidden"),
        "index": (INT, "tokens"),
        "order": (INT, "tokens"),
        "partials": (FLOAT, CHUNKS, 2, "hidden"),
        "table": (ELEMENT, "table_rows", "hidden"),
    },
    written=("partials", "table"),
    sizes="tokens tokens_per_chunk table_rows hidden padding_idx",
)

_CLEAR = Function(
    "embeddings_clear",
    {"ids": (INT, "tokens"), "rows": (ELEMENT, "tokens", "hidden")},
    written=("rows",),
    sizes="tokens hidden padding_idx",
)


def forward(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm: Norm,
    dropout: Dropout | None,
    save: bool,
    word_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    if ids.device.type == "cpu":
        # On other devices the check would need a synchronisation. The kernel gives NaN for such tokens there.
        _check_range("ids", ids, word_table.shape[0])
        _check_range("positions", positions, position_table.shape[0])
    out = position_table.new_empty(ids.shape[0], position_table.shape[1])
    z = torch.empty_like(out) if save else None
    _forward_for(word_table.dtype, out)(
        out.device,
        out.dtype,
        ids=ids,
        positions=positions,
        word_table=word_table,
        word_scale=word_scale,
        position_table=position_table,
        **norm_values(norm),
        out=out,
        z=z,
        **dropout_values(dropout),
    )
    return out, z


def _forward_for(words: torch.dtype, out: Tensor) -> Function:
    """The function for a word table in a dtype."""
    wide = out.dtype == torch.float32 and out.device.type == "cpu"
    if words == torch.int8 and not wide:
        raise ValueError(
            f"a word table in int8 needs a position table in float32 on the CPU, not in {out.dtype} on {out.device}."
        )
    return {torch.bfloat16: _BFLOAT16_FORWARD, torch.int8: _INT8_FORWARD}.get(words, _FORWARD) if wide else _FORWARD


def _check_range(name: str, rows: Tensor, size: int) -> None:
    if len(rows) == 0:
        return
    least, greatest = torch.aminmax(rows)
    if least.item() < 0 or greatest.item() >= size:
        token = int(((rows < 0) | (rows >= size)).nonzero()[0])
        raise IndexError(
            f"{name} has {int(rows[token])} at token {token}, but its table has {size} rows; use values in [0, {size})."
        )


def backward(
    grad: Tensor,
    z: Tensor,
    ids: Tensor,
    positions: Tensor,
    word_table: torch.Size | None,
    position_table: torch.Size,
    norm: NormScale,
    padding_idx: int,
    dropout: Dropout | None,
    sparse: bool,
    position_padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, hidden = z.shape
    grad_z = torch.empty_like(z)
    tokens_per_chunk = _tokens_per_chunk(z.device, tokens, hidden)
    grad_norm = z.new_empty(chunks_of(tokens, tokens_per_chunk), 2, hidden, dtype=torch.float32)
    _BACKWARD(
        z.device,
        z.dtype,
        grad=grad,
        z=z,
        weight=norm.weight,
        grad_z=grad_z,
        grad_norm=grad_norm,
        tokens_per_chunk=tokens_per_chunk,
        eps=norm.eps,
        **dropout_values(dropout),
    )
    grad_positions = _scatter(grad_z, positions, position_table[0], position_padding_idx)
    if word_table is None:
        grad_words = grad_z
    elif sparse:
        grad_words = grad_z
        _CLEAR(z.device, z.dtype, ids=ids, rows=grad_z, padding_idx=padding_idx)
    else:
        grad_words = _scatter(grad_z, ids, word_table[0], padding_idx)
    grad_weight, grad_bias = grad_norm.sum(0)  # one launch for both; results of an op may not share memory
    return grad_words, grad_positions, grad_weight, grad_bias.clone()


def _tokens_per_chunk(device: torch.device, tokens: int, hidden: int) -> int:
    """On CUDA a warp computes a chunk: as many chunks as warps are resident, by the registers that their rows take."""
    if device.type == "cpu":
        return TOKENS_PER_CHUNK
    warps = (12 if hidden <= 768 else 8) * torch.cuda.get_device_properties(device).multi_processor_count
    return max(_FEWEST_TOKENS, -(-tokens // warps))


def _scatter(rows: Tensor, index: Tensor, size: int, padding_idx: int) -> Tensor:
    """The gradient of a table with `size` rows: `rows[i]` is added to row `index[i]`, unless that is `padding_idx`."""
    tokens, hidden = rows.shape
    table = _zeros(size, hidden, rows.dtype, rows.device)
    _SCATTER(
        table.device,
        table.dtype,
        rows=rows,
        index=index,
        order=_order(index, size),
        partials=rows.new_empty(chunks_of(tokens), 2, hidden, dtype=torch.float32),
        table=table,
        tokens_per_chunk=TOKENS_PER_CHUNK,
        padding_idx=padding_idx,
    )
    return table


def _order(index: Tensor, size: int) -> Tensor:
    """The tokens in ascending order of their rows of a table with `size` rows; those outside of it at the ends.

    A GPU sorts by one byte of all keys after another, so the narrowest integers are the fastest.
    """
    narrow = next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if size <= torch.iinfo(dtype).max)
    return torch.sort(index.clamp(-1, size).to(narrow), stable=True).indices


def _zeros(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of zeros.

    On the CPU, a large one is mapped, so that pages without writes never become memory: a batch contains few words of
    the vocabulary. Filling the word table's whole gradient (768 MB at base size, in fresh pages at every step) took 0.3
    of a step's 3 seconds, and up to 1.3 when the pages had to come from a virtual machine's host.
    """
    size = rows * hidden * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(rows, hidden, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(rows, hidden)
