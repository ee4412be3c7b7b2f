"""From the arguments of a forward to the tokens it computes, with every check of the input on the way."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from . import flags, host_layout, modes
from .attended_padding import attend_to_padding
from .batch import PaddingMask, TokenBatch, key_bias_of, read
from .configuration import RESERVED_POSITIONS, ErnieMConfig


@dataclass(frozen=True)
class EncoderInputs:
    """The encoder's inputs.

    Attributes:
        batch: the tokens.
        input_ids: int64 `(tokens,)`; None if `inputs_embeds` is given.
        inputs_embeds: `(tokens, hidden)`, floating point; None if `input_ids` is given.
        positions: int64 `(tokens,)`, counted from 0.
        scores_bias: added to attention scores, broadcastable to `(rows, heads, columns, columns)`; None unless there is
            a mask per query.
        columns: the number of columns of the input; None if the batch's grid has no more.
    """

    batch: TokenBatch
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    positions: Tensor
    scores_bias: Tensor | None
    columns: int | None = None

    def unpack(self, x: Tensor) -> Tensor:
        """`(tokens, ...)` to `(rows, columns, ...)` of the input; see `TokenBatch.unpack`."""
        rows = self.batch.unpack(x)
        return rows if self.columns is None else rows[:, : self.columns].contiguous()

    def unpack_attention(self, probabilities: Tensor) -> Tensor:
        """Attention probabilities by columns of the input; see `TokenBatch.unpack_attention`."""
        rows = self.batch.unpack_attention(probabilities)
        return rows if self.columns is None else rows[..., : self.columns, : self.columns].contiguous()


def prepare(
    config: ErnieMConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    needs_first: bool,
    vocabulary: int,
    key_ranges: Tensor | None = None,
) -> EncoderInputs:
    """Checks the input and lays out its tokens: packed, unless the flag or a mask per query forbids it.

    Args:
        config: the model's configuration.
        input_ids: integer `(rows, columns)`; None if `inputs_embeds`, `(rows, columns, hidden)`, is given.
        attention_mask: `(rows, columns)`, or one mask per query: `(rows, columns, columns)` or `(rows, 1 or heads,
            columns, columns)`; None for all tokens in `input_ids` that are not padding.
        position_ids: integer `(rows, columns)` or `(1, columns)`, counted from 0; None for each token's column.
        cu_seqlens, max_seqlen: bounds and longest length of the sequences in input that comes packed in one row.
        needs_first: whether a pooler reads the first column, even if it is padding.
        vocabulary: number of rows of the word table.
        key_ranges: in input that comes packed, integer `(tokens, 2)`, the keys of each token; see `Sequences`.

    Returns:
        The encoder's inputs.

    Raises:
        ValueError: the input cannot be run; the message names the argument, its value and the remedy.
    """
    check_tensors(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cu_seq_lens_q=cu_seqlens,
    )
    tensors = (input_ids, attention_mask, position_ids, cu_seqlens, key_ranges)
    if inputs_embeds is None and host_layout.serves(*tensors):
        ids, mask, positions, cuts, ranges = host_layout.on_host(*tensors)
        rest = (max_seqlen, needs_first, vocabulary, ranges)
        return host_layout.to_device(prepare(config, ids, None, mask, positions, cuts, *rest), input_ids.device)
    if modes.is_transformed():
        _check_not_mapped(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
    grid, longest = find_grid(config, input_ids, inputs_embeds), config.max_position_embeddings - RESERVED_POSITIONS
    input_ids = None if input_ids is None else input_ids.long()  # PyTorch has few operators for unsigned integers
    position_ids = expand_to_grid("position_ids", position_ids, grid)
    device = (inputs_embeds if input_ids is None else input_ids).device
    came_packed = cu_seqlens is not None or max_seqlen is not None
    _check_attended_padding(config, inputs_embeds, came_packed)
    if position_ids is not None:
        position_ids = position_ids.to(device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device)
    ids, positions = input_ids, position_ids
    mask = key_bias = scores_bias = padding = None
    if key_ranges is not None:
        _check_key_ranges(key_ranges, grid, came_packed)
    if came_packed:
        check_packed(grid, cu_seqlens, max_seqlen, attention_mask)
        check_length("max_length_q", max_seqlen, longest)
    else:
        check_length("the input's number of columns", grid[1], longest)
        if attention_mask is not None:
            _check_mask(attention_mask, grid, config.num_attention_heads)
            attention_mask = attention_mask.to(device)
        if attention_mask is not None and attention_mask.dim() > 2:
            scores_bias = _scores_bias(attention_mask)
        else:
            mask = _padding_mask(config, input_ids, attention_mask, grid, device)
            if config.uie_padded_length is not None:
                ids, positions, mask, key_bias = attend_to_padding(config, input_ids, position_ids, mask)
            elif is_full(mask):
                mask = None
            if mask is not None and _packs(mask):
                padding = PaddingMask(mask, needs_first, key_bias)

    sizes = padding.sizes() if padding else {}
    to_check = {
        **extremes("input_ids", input_ids),
        **extremes("position_ids", position_ids),
        **bounds(cu_seqlens),
        **_odd_values(attention_mask),
    }
    found = read({**to_check, **sizes}) if padding or may_read(to_check) else {}
    if found:
        _check_structure(found, grid, max_seqlen, attention_mask, position_ids)
        check_range("input_ids", input_ids, vocabulary, found)
        check_range("position_ids", position_ids, longest, found)

    if came_packed:
        batch = TokenBatch.from_cu_seqlens(cu_seqlens, max_seqlen, grid[1])
        if key_ranges is not None:
            batch = batch.attending_to(key_ranges.to(device, torch.int32))
    elif padding:
        batch = padding.pack(**{name: found[name] for name in sizes})
    elif mask is None:
        batch = TokenBatch.padded(grid, device)
    else:
        real = mask if leaves_out_padding() else None
        batch = TokenBatch.padded(tuple(mask.shape), device, key_bias_of(mask) if key_bias is None else key_bias, real)
    return EncoderInputs(
        batch=batch,
        input_ids=None if ids is None else batch.pack(ids),
        inputs_embeds=None if inputs_embeds is None else batch.pack(inputs_embeds),
        positions=batch.columns if positions is None else batch.pack(positions),
        scores_bias=scores_bias,
        columns=None if key_bias is None else grid[1],
    )


def real_positions(config: ErnieMConfig, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """The real tokens of the grid, bool `(rows, columns)`; None if every position counts, as in the padded layout."""
    if not leaves_out_padding():
        return None
    if attention_mask is None:
        return None if input_ids is None else input_ids != config.pad_token_id
    return attention_mask != 0 if attention_mask.dim() == 2 else None


def _check_not_mapped(**values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None and modes.is_mapped(value):
            raise ValueError(
                f"{name} is mapped over by torch.vmap, but its values decide which tokens are computed; map over "
                f"parameters or inputs_embeds, or loop over the rows."
            )


def _check_attended_padding(config: ErnieMConfig, inputs_embeds: Tensor | None, came_packed: bool) -> None:
    """Refuses input without ids or rows, where padding cannot be attended to as `config.uie_padded_length` asks."""
    if config.uie_padded_length is None or (inputs_embeds is None and not came_packed):
        return
    given, remedy = ("inputs_embeds", "input_ids") if inputs_embeds is not None else ("cu_seq_lens_q", "attention_mask")
    raise ValueError(
        f"{given} cannot be used with uie_padded_length={config.uie_padded_length}, where [CLS] and padding are told "
        f"apart by their ids, row by row; pass {remedy}, or set config.uie_padded_length to None."
    )


def check_tensors(**values: Tensor | None) -> None:
    """Refuses arguments that are no tensors."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{name} is of type {type(value).__name__}; call model(**batch), with two asterisks.")
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is of type {type(value).__name__}, but must be a tensor: pass return_tensors='pt' to the "
                f"tokenizer, or call torch.tensor."
            )


def as_integer(name: str, value: object, least: int, most: int | None = None, why: str = "") -> int:
    """An argument that counts something, as an int; integers of NumPy and PyTorch are as good.

    Raises:
        ValueError: it is no integer, or not in the range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name}={value!r} must be an integer {allowed}{why}.")
    return number


def find_grid(config: PreTrainedConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """Rows and columns of the input, whose shape and dtype are checked."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither was" if input_ids is None else "both were"
        raise ValueError(f"Pass either input_ids or inputs_embeds; {given} given.")
    if inputs_embeds is not None:
        sizes = inputs_embeds.dim() == 3 and inputs_embeds.shape[2] == config.hidden_size
        if not sizes or not inputs_embeds.is_floating_point():
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)} and dtype {inputs_embeds.dtype}; it must hold "
                f"floating-point numbers of shape (rows, columns, hidden_size={config.hidden_size})."
            )
    elif input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; it must hold integers of shape "
            f"(rows, columns). For a single sequence, pass input_ids[None]."
        )
    rows, columns = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    if columns == 0:
        raise ValueError("The input has no columns; a sequence needs at least one token, such as [CLS].")
    return rows, columns


def check_length(what: str, length: int, limit: int) -> None:
    """Refuses more tokens in a sequence than there are positions."""
    if length > limit:
        raise ValueError(
            f"{what} is {length}, but this model has positions for {limit} tokens; truncate to max_length={limit} or "
            f"cut the text into windows."
        )


def expand_to_grid(name: str, values: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """Integers for each column, or for each position, as int64 `(rows, columns)`."""
    if values is None:
        return None
    sizes = values.dim() == 2 and values.shape[0] in (1, grid[0]) and values.shape[1] == grid[1]
    if not sizes or values.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}; it must hold integers of shape {grid} "
            f"like the input, or (1, {grid[1]})."
        )
    return values.long().expand(grid)


def check_packed(
    grid: tuple[int, int], cu_seqlens: Tensor | None, max_seqlen: int | None, attention_mask: Tensor | None
) -> None:
    """Checks the shapes of input that came packed."""
    if cu_seqlens is None or max_seqlen is None:
        missing = "cu_seq_lens_q" if cu_seqlens is None else "max_length_q"
        raise ValueError(f"Packed input needs both cu_seq_lens_q and max_length_q; {missing} is missing.")
    if grid[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"Packed input (cu_seq_lens_q) must be one row without attention_mask; {grid[0]} rows came, "
            f"{'with' if attention_mask is not None else 'without'} attention_mask."
        )
    if isinstance(max_seqlen, float | str | list):
        raise ValueError(f"max_length_q is {max_seqlen!r}; it must be an integer, the length of the longest sequence.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seq_lens_q has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must hold integers of "
            f"shape (sequences + 1,), with at least one sequence."
        )


def _check_key_ranges(key_ranges: Tensor, grid: tuple[int, int], came_packed: bool) -> None:
    """Checks the shape of key ranges, and that there are sequences for them."""
    if not came_packed:
        raise ValueError("key_ranges need packed input: pass cu_seq_lens_q and max_length_q too, or a mask per query.")
    if key_ranges.shape != (grid[1], 2) or key_ranges.is_floating_point():
        raise ValueError(
            f"key_ranges has shape {tuple(key_ranges.shape)} and dtype {key_ranges.dtype}; it must hold integers of "
            f"shape ({grid[1]}, 2), two for each token."
        )


def _check_mask(mask: Tensor, grid: tuple[int, int], heads: int) -> None:
    """Checks the shape of a padding mask or of a mask per query."""
    rows, columns = grid
    if mask.dim() <= 2:
        if mask.dim() != 2 or mask.shape[0] not in (1, rows) or mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; it must be {grid} like the input, or a mask per query "
                f"of shape ({rows}, {columns}, {columns}) or ({rows}, 1 or heads, {columns}, {columns})."
            )
        return
    shape = _with_heads(mask).shape
    allowed = ((1, rows), (1, heads), (1, columns), (columns,))
    if len(shape) != 4 or any(size not in sizes for size, sizes in zip(shape, allowed, strict=True)):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; a mask per query must be ({rows}, {columns}, {columns}) or "
            f"({rows}, 1 or {heads}, {columns}, {columns})."
        )


def _padding_mask(
    config: ErnieMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    grid: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """The padding mask, bool `(rows, columns)`, True for real tokens."""
    if attention_mask is None:
        mask = torch.ones(grid, dtype=torch.bool, device=device)
        return mask if input_ids is None else input_ids != config.pad_token_id
    return attention_mask.expand(grid) != 0


def is_full(mask: Tensor) -> bool:
    """Whether all positions are real tokens, if the host need not wait for the answer."""
    return mask.device.type == "cpu" and modes.has_values(mask) and not modes.is_recorded() and bool(mask.all())


def _scores_bias(mask: Tensor) -> Tensor:
    """The bias of the scores for a mask per query: 0 to attend, -inf not to. A 4-D mask of floats is itself a bias."""
    bias = _with_heads(mask)
    if _is_bias(mask):
        return bias.masked_fill(bias <= torch.finfo(bias.dtype).min, -torch.inf)
    return torch.zeros(bias.shape, device=bias.device).masked_fill(bias == 0, -torch.inf)


def _with_heads(mask: Tensor) -> Tensor:
    """A mask per query with four dimensions; the same mask serves all heads if it has three."""
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


def _is_bias(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.is_floating_point()


def _packs(mask: Tensor) -> bool:
    """Whether padding is left out of the computation.

    Not in exported graphs, where this mask's number of tokens would be a constant, and not without values.
    """
    return leaves_out_padding() and not modes.is_exported() and modes.has_values(mask)


@torch.compiler.assume_constant_result
def leaves_out_padding() -> bool:
    return flags.read(flags.PACKING) == "1"


# --- Values to read from the device: integer tensors with one element, by name ---------------------------------------


def extremes(name: str, values: Tensor | None) -> dict[str, Tensor]:
    """The least and the greatest value; nothing for an exported graph, which must serve all values."""
    if values is None or modes.is_exported() or values.numel() == 0:
        return {}
    least, greatest = torch.aminmax(values)
    return {f"least of {name}": least, f"greatest of {name}": greatest}


def bounds(cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """The first and the last bound of the sequences, and the lengths of the shortest and the longest sequence."""
    if cu_seqlens is None:
        return {}
    lengths = cu_seqlens.diff()
    return {"start": cu_seqlens[0], "end": cu_seqlens[-1], "shortest": lengths.amin(), "longest": lengths.amax()}


def _odd_values(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Values that show whether a mask holds only 0 and 1; nothing for a bias and for exported graphs."""
    if attention_mask is None or _is_bias(attention_mask) or modes.is_exported():
        return {}
    if attention_mask.dtype == torch.int64:  # what tokenizers return; on a GPU, one kernel instead of four
        return extremes("attention_mask", attention_mask)
    return {"odd values": ((attention_mask != 0) & (attention_mask != 1)).any()}


def may_read(values: dict[str, Tensor]) -> bool:
    """Whether the host can wait for the values: not while a graph is recorded or captured, and only if they exist."""
    if modes.is_recorded() or not values or not all(map(modes.has_values, values.values())):
        return False
    return not modes.is_captured()


# --- Checks of the values that were read -----------------------------------------------------------------------------


def _check_structure(
    found: dict[str, int],
    grid: tuple[int, int],
    max_seqlen: int | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    """Checks the bounds of packed sequences, the values of the mask, and positions that contradict either."""
    if "start" in found:
        check_bounds(found, grid, max_seqlen)
        _check_first_position(found)
    elif attention_mask is None:
        _check_no_mask(position_ids, found)
        _check_one_sequence(position_ids, found)
    is_binary = found.get("least of attention_mask", 0) >= 0 and found.get("greatest of attention_mask", 1) <= 1
    if not is_binary or found.get("odd values"):
        raise ValueError(
            "attention_mask holds values other than 0 and 1; pass 1 for real tokens and 0 for padding. A mask to "
            "add to the scores must have four dimensions and hold floating-point numbers."
        )


def check_bounds(found: dict[str, int], grid: tuple[int, int], max_seqlen: int) -> None:
    """Refuses bounds of packed sequences that are not those of the input's tokens; `found` holds those of `bounds`."""
    if found["start"] != 0 or found["end"] != grid[1] or found["shortest"] < 0 or found["longest"] > max_seqlen:
        raise ValueError(
            f"cu_seq_lens_q runs from {found['start']} to {found['end']} with sequences of {found['shortest']} to "
            f"{found['longest']} tokens; it must rise from 0 to the {grid[1]} tokens of the input, by at most "
            f"max_length_q={max_seqlen} a step."
        )


def _check_first_position(found: dict[str, int]) -> None:
    """Refuses packed input without a position 0: its positions do not count from 0, and all would be shifted."""
    least = found.get("least of position_ids", 0)
    if least > 0:
        raise ValueError(
            f"position_ids of packed input start at {least}; positions count from 0 in every sequence, as "
            f"DataCollatorWithFlattening(position_ids_start=0) makes them."
        )


def _check_no_mask(position_ids: Tensor | None, found: dict[str, int]) -> None:
    """Refuses positions that are a mask: the model takes positions second, the heads take the mask there."""
    if position_ids is None or position_ids.shape[1] < 3 or "least of position_ids" not in found:
        return
    if (found["least of position_ids"], found["greatest of position_ids"]) in ((0, 1), (1, 1)):
        raise ValueError(
            f"position_ids holds only 0 and 1 in {position_ids.shape[1]} columns, as a mask does; pass the mask by its "
            f"name, attention_mask=. For such positions, pass an attention_mask too."
        )


def _check_one_sequence(position_ids: Tensor | None, found: dict[str, int]) -> None:
    """Refuses positions that start anew within a single row: several sequences in it would attend to each other."""
    if position_ids is None or len(position_ids) != 1 or "least of position_ids" not in found:
        return
    least, greatest = found["least of position_ids"], found["greatest of position_ids"]
    if greatest - least >= position_ids.shape[1] - 1:
        return
    starts = (position_ids[0, 1:] == least).nonzero()
    if len(starts):
        raise ValueError(
            f"position_ids start anew at column {starts[0].item() + 1} of a single row. If the row holds several "
            f"sequences, pass cu_seq_lens_q and max_length_q, as "
            f"DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them; if it holds one, pass an "
            f"attention_mask of ones."
        )


_REMEDIES = {
    "input_ids": "check that tokenizer and model belong together, or call resize_token_embeddings",
    "position_ids": "positions count from 0",
}


def check_range(name: str, values: Tensor | None, limit: int, found: dict[str, int], remedy: str | None = None) -> None:
    """Refuses ids or positions that are not rows of their table; `found` holds their `extremes`."""
    least, greatest = found.get(f"least of {name}", 0), found.get(f"greatest of {name}", 0)
    if least < 0 or greatest >= limit:
        row, column = ((values < 0) | (values >= limit)).nonzero()[0].tolist()
        found, remedy = values[row, column].item(), remedy or _REMEDIES[name]
        raise ValueError(f"{name}[{row}, {column}] is {found}, outside [0, {limit}); {remedy}.")
