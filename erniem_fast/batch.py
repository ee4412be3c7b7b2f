"""TokenBatch: the tokens that a forward computes, and their places in the grid of the caller's tensors."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import modes
from .dropout import Dropout


class Sequences(NamedTuple):
    """How tokens are cut into sequences, and how they are attended to.

    Attributes:
        cu_seqlens: int32 `(sequences + 1,)`; sequence i consists of tokens `cu_seqlens[i] … cu_seqlens[i + 1] - 1`.
        max_seqlen: an upper bound on the number of tokens of a sequence.
        longest_first: int64 `(sequences,)`, the sequences in the order in which attention starts them.
        contiguous: True if every token's column is known to be its index in its sequence; otherwise False.
        sequence_ids: int64 `(tokens,)`, the index of each token's sequence.
        key_bias: float32 `(tokens,)`, added to each scaled score of a token as a key; -inf for tokens that are not
            attended to, and log(n) for one that stands for n equal ones. None for zeros. It gets no gradient.
        key_ranges: int32 `(tokens, 2)`, the first and the end of the tokens that each one attends to, as their indices
            in its sequence; what lies outside the sequence does not count. None if each attends to all.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    longest_first: Tensor
    contiguous: bool
    sequence_ids: Tensor
    key_bias: Tensor | None = None
    key_ranges: Tensor | None = None

    def indices(self) -> Tensor:
        """int64 `(tokens,)`, each token's index in its sequence."""
        token = torch.arange(self.sequence_ids.shape[0], device=self.sequence_ids.device)
        return token - self.cu_seqlens.long()[self.sequence_ids]


def key_bias_of(mask: Tensor) -> Tensor:
    """The key bias for a mask of any shape, bool, False for tokens that are not attended to."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of all sequences, one after another, described once for all layers and the backward.

    Attributes:
        sequences: how the tokens are cut into sequences.
        columns: int64 `(tokens,)`, each token's column in the grid; in input that came packed, its index in its
            sequence.
        grid: `(rows, columns)` of the tensors that `pack` takes and `unpack` returns.
        fills_grid: True if every row of the grid is a sequence without gaps, so that a view turns tokens into rows.
        indices: int64 `(tokens,)`, each token's place in the flattened grid; None if the tokens fill it in order.
        real: bool `(tokens,)`, False for tokens whose results are shown as zeros; None if there are none.

    Raises:
        ValueError: the sequences' key bias or key ranges have another dtype or shape, or require gradients.
    """

    sequences: Sequences
    columns: Tensor
    grid: tuple[int, int]
    fills_grid: bool
    indices: Tensor | None
    real: Tensor | None

    def __post_init__(self) -> None:
        tokens = self.columns.shape[0]
        for name, dtype, shape in (("key_bias", torch.float32, (tokens,)), ("key_ranges", torch.int32, (tokens, 2))):
            value = getattr(self.sequences, name)
            if value is not None and (value.dtype != dtype or value.shape != shape):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; for {tokens} tokens it must have "
                    f"shape {shape} and dtype {dtype}."
                )
            if value is not None and value.requires_grad:
                raise ValueError(f"{name} requires gradients, but attention gives it none; pass {name}.detach().")

    @classmethod
    def padded(
        cls,
        grid: tuple[int, int],
        device: torch.device,
        key_bias: Tensor | None = None,
        real: Tensor | None = None,
    ) -> "TokenBatch":
        """The batch in which every position of the grid is a token.

        Args:
            grid: `(rows, columns)`.
            device: of the batch's tensors.
            key_bias: float32 `(rows, columns)`, see `Sequences`; None for zeros.
            real: bool `(rows, columns)`, False for positions where results are shown as zeros, as in the packed
                layout; None if there are none.
        """
        followed = modes.is_followed(()) or modes.is_transformed()
        if key_bias is real is None and device.type == "cpu" and not followed:
            return _full_batch(grid)
        return cls._padded(grid, device, key_bias, real)

    @classmethod
    def _padded(
        cls, grid: tuple[int, int], device: torch.device, key_bias: Tensor | None, real: Tensor | None
    ) -> "TokenBatch":
        rows, columns = grid
        row = torch.arange(rows, device=device)
        sequences = Sequences(
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device) * columns,
            max_seqlen=columns,
            longest_first=row,
            contiguous=True,
            sequence_ids=row[:, None].expand(grid).flatten(),
            key_bias=None if key_bias is None else key_bias.flatten(),
        )
        return cls(
            sequences=sequences,
            columns=torch.arange(columns, device=device).expand(grid).flatten(),
            grid=grid,
            fills_grid=True,
            indices=None,
            real=None if real is None else real.flatten(),
        )

    @classmethod
    def from_mask(cls, mask: Tensor, *, keep_first: bool, key_bias: Tensor | None = None) -> "TokenBatch":
        """Packs the tokens of a padding mask, with one synchronisation; the arguments are those of `PaddingMask`."""
        padding = PaddingMask(mask, keep_first, key_bias)
        return padding.pack(**read(padding.sizes()))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> "TokenBatch":
        """The batch of input that came packed in one row.

        Args:
            cu_seqlens: integer `(sequences + 1,)`, rising from 0 to `tokens`: where sequences start and end.
            max_seqlen: an upper bound on the number of tokens of a sequence.
            tokens: the number of tokens, all real.
        """
        token = torch.arange(tokens, device=cu_seqlens.device)
        sequence_ids = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        sequences = Sequences(
            cu_seqlens=cu_seqlens.int(),
            max_seqlen=max_seqlen,
            longest_first=cu_seqlens.diff().argsort(descending=True),
            contiguous=True,
            sequence_ids=sequence_ids,
            key_bias=None,
        )
        return cls(
            sequences=sequences,
            columns=token - cu_seqlens.long()[sequence_ids],
            grid=(1, tokens),
            fills_grid=False,
            indices=None,
            real=None,
        )

    def attending_to(self, key_ranges: Tensor) -> "TokenBatch":
        """The same batch, in which each token attends only to the keys in its range; see `Sequences.key_ranges`."""
        return replace(self, sequences=self.sequences._replace(key_ranges=key_ranges))

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.columns.shape[0]

    def dropout(self, p: float, seed: Tensor) -> Dropout:
        """The dropout of these tokens' features, or of the attention probabilities between them."""
        return Dropout(p, seed, self.columns, self.sequences.sequence_ids)

    def pack(self, x: Tensor) -> Tensor:
        """`(rows, columns, ...)` to `(tokens, ...)`."""
        flat = x.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """`(tokens, ...)` to `(rows, columns, ...)`, with zeros where there is no token or one that is not real."""
        if self.real is not None:
            x = torch.where(self.real.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))
        if self.indices is None:
            return x.unflatten(0, self.grid)
        rows, columns = self.grid
        flat = x.new_zeros((rows * columns, *x.shape[1:])).index_copy(0, self.indices, x)
        return flat.unflatten(0, self.grid)

    def first_tokens(self, x: Tensor) -> Tensor:
        """`(tokens, features)` to `(sequences, features)`: each sequence's first token, zeros if it has no tokens."""
        if self.fills_grid:
            return x.unflatten(0, self.grid)[:, 0]
        first, end = self.sequences.cu_seqlens[:-1].long(), self.sequences.cu_seqlens[1:]
        present = end > first
        if self.tokens == 0:
            return x.new_zeros(first.shape[0], x.shape[1])
        return torch.where(present[:, None], x[first.clamp(max=self.tokens - 1)], 0)

    def unpack_attention(self, probabilities: Tensor) -> Tensor:
        """Attention probabilities by columns of the grid, with zeros if the query or the key is padding.

        Args:
            probabilities: `(sequences, heads, max_seqlen, max_seqlen)`, by the query's and the key's index in the
                sequence.

        Returns:
            `(rows, heads, columns, columns)`; for input that came packed, the shape of `probabilities`.
        """
        if self.fills_grid:
            if self.real is None:
                return probabilities
            real = self.real.view(self.grid)
        elif self.indices is None:  # input that came packed: indices beyond a sequence's length have no token
            lengths = self.sequences.cu_seqlens.diff()
            real = torch.arange(self.sequences.max_seqlen, device=lengths.device) < lengths[:, None]
        else:
            rows, columns = self.grid
            heads = probabilities.shape[1]
            if self.sequences.max_seqlen == 0:
                return probabilities.new_zeros(rows, heads, columns, columns)
            index = self.unpack(self.sequences.indices())
            real = self.unpack(torch.ones_like(self.columns, dtype=torch.bool))
            by_query = probabilities.gather(2, index[:, None, :, None].expand(-1, heads, -1, self.sequences.max_seqlen))
            probabilities = by_query.gather(3, index[:, None, None, :].expand(-1, heads, columns, -1))
        return probabilities * (real[:, None, :, None] & real[:, None, None, :])


@lru_cache(maxsize=16)
def _full_batch(grid: tuple[int, int]) -> TokenBatch:
    """`TokenBatch.padded` on the CPU; kept, because to make its tensors takes as long as a layer of few tokens."""
    with torch.inference_mode(False):  # tensors that are made in inference mode are useless in training
        return TokenBatch._padded(grid, torch.device("cpu"), None, None)


class PaddingMask:
    """A padding mask on its way to a batch: sizes must be read from the device before its tokens can be packed."""

    def __init__(self, mask: Tensor, keep_first: bool, key_bias: Tensor | None = None) -> None:
        """
        Args:
            mask: bool `(rows, columns)`, True for real tokens.
            keep_first: whether to compute column 0 of every row, because a pooler reads it; if it is padding, no token
                attends to it.
            key_bias: float32 `(rows, columns)`, see `Sequences`; tokens that are attended to are computed, real or not.
                None for 0 at real tokens, and -inf at others.
        """
        self._mask, self._key_bias = mask, key_bias
        self._computed = mask if key_bias is None else mask | (key_bias > -torch.inf)
        if keep_first and mask.shape[1]:
            self._computed = self._computed.clone()
            self._computed[:, 0] = True
        self._lengths = self._computed.sum(dim=1)

    def sizes(self) -> dict[str, Tensor]:
        """The arguments of `pack`, each an integer tensor with one element, on the device."""
        return {
            "tokens": self._lengths.sum(),
            "max_seqlen": self._lengths.amax() if len(self._lengths) else self._lengths.sum(),
            "real_tokens": self._mask.sum(),
            "holes": (self._computed[:, 1:] > self._computed[:, :-1]).sum(),
        }

    def pack(self, tokens: int, max_seqlen: int, real_tokens: int, holes: int) -> TokenBatch:
        """The batch of the tokens that are computed.

        Args:
            tokens: the number of these tokens.
            max_seqlen: the largest number of them in a row.
            real_tokens: the number of them that are real.
            holes: the number of them that directly follow padding.
        """
        mask, key_bias, (rows, columns) = self._mask, self._key_bias, self._mask.shape
        if key_bias is None and real_tokens < tokens:
            key_bias = key_bias_of(mask)
        if columns and tokens == rows * columns:
            return TokenBatch.padded((rows, columns), mask.device, key_bias, mask if real_tokens < tokens else None)
        indices = torch.nonzero_static(self._computed.flatten(), size=tokens).squeeze(-1)
        cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=mask.device)
        cu_seqlens[1:] = self._lengths.cumsum(0)
        sequences = Sequences(
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            longest_first=self._lengths.argsort(descending=True),
            contiguous=holes == 0,
            sequence_ids=indices // columns,
            key_bias=None if key_bias is None else key_bias.flatten()[indices],
        )
        return TokenBatch(
            sequences=sequences,
            columns=indices % columns,
            grid=(rows, columns),
            fills_grid=False,
            indices=indices,
            real=mask.flatten()[indices] if real_tokens < tokens else None,
        )


def read(values: dict[str, Tensor]) -> dict[str, int]:
    """Reads integer tensors with one element each from their device, with one synchronisation."""
    if not values:
        return {}
    numbers = torch.stack([value.reshape(()).long() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
