"""From the arguments of a forward to the tokens that it computes, with the checks of the input on the way."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import host_layout
from ..batch import PaddingMask, TokenBatch, key_bias_of, read
from ..inputs import (
    bounds,
    check_bounds,
    check_length,
    check_packed,
    check_range,
    expand_to_grid,
    extremes,
    find_grid,
    is_full,
    leaves_out_padding,
    may_read,
)


@dataclass(frozen=True)
class Tokens:
    """What a forward computes.

    Attributes:
        batch: the tokens: those that are attended to, and the first of each row, which poolers and heads read.
        input_ids: int64 `(tokens,)`; None if `inputs_embeds`, `(tokens, hidden)`, is given.
        positions, types: int64 `(tokens,)`, rows of the position table and of the table of token types.
        came_packed: whether the input was one row of several sequences.
    """

    batch: TokenBatch
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    positions: Tensor
    types: Tensor
    came_packed: bool


def lay_out(
    model: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tokens:
    """Checks the input and lays out its tokens; without a mask all are attended to, padding included.

    Args:
        model: a packed model.
        input_ids, inputs_embeds, attention_mask, position_ids, token_type_ids: of its forward.
        cu_seqlens, max_seqlen: bounds and longest length of the sequences in input that comes packed in one row.

    Raises:
        ValueError: see `PackedModel.forward`.
    """
    tensors = (input_ids, attention_mask, position_ids, token_type_ids, cu_seqlens)
    if inputs_embeds is None and host_layout.serves(*tensors):
        ids, mask, positions, types, cuts = host_layout.on_host(*tensors)
        tokens = lay_out(model, ids, None, mask, positions, types, cuts, max_seqlen)
        return host_layout.to_device(tokens, input_ids.device)
    grid = find_grid(model.config, input_ids, inputs_embeds)
    input_ids = None if input_ids is None else input_ids.long()
    device = (inputs_embeds if input_ids is None else input_ids).device
    if position_ids is not None:
        position_ids = expand_to_grid("position_ids", position_ids.to(device), grid)
    if token_type_ids is not None:
        token_type_ids = expand_to_grid("token_type_ids", torch.atleast_2d(token_type_ids), grid)
    if cu_seqlens is None and max_seqlen is None and attention_mask is None and position_ids is not None:
        cu_seqlens, max_seqlen = restarts(position_ids)
    came_packed = cu_seqlens is not None or max_seqlen is not None
    padding = None
    if came_packed:
        check_packed(grid, cu_seqlens, max_seqlen, attention_mask)
        check_length("max_length_q", max_seqlen, model.longest_sequence)
    else:
        mask = None if attention_mask is None else attention_mask.to(device) != 0
        if mask is not None and is_full(mask):
            mask = None
        padding = PaddingMask(mask, keep_first=True) if mask is not None and leaves_out_padding() else None
    sizes = padding.sizes() if padding else {}
    to_check = {
        **extremes("input_ids", input_ids),
        **extremes("position_ids", position_ids),
        **extremes("token_type_ids", token_type_ids),
        **bounds(cu_seqlens),
    }
    found = read({**to_check, **sizes}) if padding or may_read(to_check) else {}
    if came_packed:
        if found:
            check_bounds(found, grid, max_seqlen)
        batch = TokenBatch.from_cu_seqlens(cu_seqlens.to(device), max_seqlen, grid[1])
        positions = _packed_positions(model, batch, position_ids, found)
    else:
        if padding:
            # What is computed in the first column is shown, even if it is padding.
            batch = replace(padding.pack(**{name: found[name] for name in sizes}), real=None)
        else:
            batch = TokenBatch.padded(grid, device, None if mask is None else key_bias_of(mask))
        positions = batch.pack(_positions(model, input_ids, position_ids, grid, device, found))
    _check_ids(model, input_ids, token_type_ids, found)
    types = torch.zeros_like(positions) if token_type_ids is None else batch.pack(token_type_ids)
    ids, embeds = (None if each is None else batch.pack(each) for each in (input_ids, inputs_embeds))
    return Tokens(batch, ids, embeds, positions, types, came_packed)


def restarts(position_ids: Tensor) -> tuple[Tensor, int] | tuple[None, None]:
    """Bounds and longest length of the sequences in a single row, if its positions start anew with each; else None."""
    if len(position_ids) != 1 or not may_read({"position_ids": position_ids}):
        return None, None
    row = position_ids[0]
    starts = torch.cat([row.new_zeros(1), (row.diff() != 1).nonzero().flatten() + 1])
    if len(starts) == 1 or bool((row[starts] != row[0]).any()):
        return None, None
    cu_seqlens = torch.cat([starts, starts.new_tensor([len(row)])])
    return cu_seqlens, int(cu_seqlens.diff().amax())


def _packed_positions(
    model: nn.Module, batch: TokenBatch, position_ids: Tensor | None, found: dict[str, int]
) -> Tensor:
    """Rows of the position table for packed input, whose positions count from 0 or from the model's first row."""
    first = model.first_position
    if position_ids is None:
        return batch.columns + first
    least = found.get("least of position_ids", 0)
    if least not in (0, first):
        allowed = f"0, or from {first} as this model's," if first else "0"
        raise ValueError(
            f"position_ids of packed input start at {least}; positions count from {allowed} in every sequence, as "
            f"DataCollatorWithFlattening(position_ids_start={first}) makes them."
        )
    _check_positions(model, position_ids, first if least == 0 else 0, found)
    return batch.pack(position_ids) + first * (position_ids.amin() == 0)


def _positions(
    model: nn.Module,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    grid: tuple[int, int],
    device: torch.device,
    found: dict[str, int],
) -> Tensor:
    """`(rows, columns)`, rows of the position table."""
    if position_ids is not None:
        _check_positions(model, position_ids, 0, found)
        return position_ids
    positions = model.default_positions(input_ids, grid, device)
    # Where padding does not count, more columns than positions may be filled by fewer tokens.
    if grid[1] > model.longest_sequence and may_read({"positions": positions}):
        tokens = int(positions.amax()) - model.first_position + 1
        name = "inputs_embeds" if input_ids is None else "input_ids"
        check_length(f"the number of tokens in the longest row of {name}", tokens, model.longest_sequence)
    return positions


def rows_of(table: nn.Module, configured: int) -> int:
    """The number of rows of a table; that of the config for a module around one, such as an adapter."""
    return getattr(table, "num_embeddings", configured)


def position_rows(model: nn.Module) -> int:
    """The number of rows of the position table."""
    return rows_of(model.embeddings.position_embeddings, model.config.max_position_embeddings)


def _check_positions(model: nn.Module, position_ids: Tensor, shift: int, found: dict[str, int]) -> None:
    rows = position_rows(model)
    check_range("position_ids", position_ids, rows - shift, found, f"the position table has {rows} rows")


def _check_ids(
    model: nn.Module, input_ids: Tensor | None, token_type_ids: Tensor | None, found: dict[str, int]
) -> None:
    words = rows_of(model.embeddings.word_embeddings, model.config.vocab_size)
    types = rows_of(model.embeddings.token_type_embeddings, model.config.type_vocab_size)
    check_range("input_ids", input_ids, words, found)
    check_range("token_type_ids", token_type_ids, types, found, f"config.type_vocab_size is {types}")
