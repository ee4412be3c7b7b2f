"""TokenBatch: which tokens a forward computes, and where they stand in the grid that the caller sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of all sequences, one after another, described once for all layers and the backward.

    Attributes:
        cu_seqlens: int32 `(sequences + 1,)`; sequence i owns tokens `cu_seqlens[i] … cu_seqlens[i + 1] - 1`.
        max_seqlen: an upper bound of the number of tokens of a sequence.
        longest_first: int64 `(sequences,)`, the sequences in the order in which attention takes them up.
        columns: int64 `(tokens,)`, each token's column in its sequence's row of the grid.
        contiguous: True where every token's column is its index in its sequence; False where that is not known.
        sequences: int64 `(tokens,)`, each token's sequence.
        key_mask: bool `(tokens,)`, False for tokens that nobody attends to; None when there is none.
        grid: `(rows, columns)` of the caller's tensors.
        fills_grid: True where every row of the grid is a sequence without gaps, so that a view turns tokens into rows.
        indices: int64 `(tokens,)`, each token's place in the flattened grid; None when the tokens fill it in order.
        packed: True when only real tokens count, False when every position of the grid is computed.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    longest_first: Tensor
    columns: Tensor
    contiguous: bool
    sequences: Tensor
    key_mask: Tensor | None
    grid: tuple[int, int]
    fills_grid: bool
    indices: Tensor | None
    packed: bool

    @classmethod
    def padded(
        cls, grid: tuple[int, int], device: torch.device, key_mask: Tensor | None = None, packed: bool = False
    ) -> "TokenBatch":
        """Every position of the grid is a token; `key_mask`, bool `(rows, columns)`, says who is attended to.

        With `packed` what is computed at padding is not shown, so that nobody sees a difference to the packed layout.
        """
        rows, columns = grid
        return cls(
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device) * columns,
            max_seqlen=columns,
            longest_first=torch.arange(rows, device=device),
            columns=torch.arange(columns, device=device).expand(grid).flatten(),
            contiguous=True,
            sequences=torch.arange(rows, device=device)[:, None].expand(grid).flatten(),
            key_mask=None if key_mask is None else key_mask.flatten(),
            grid=grid,
            fills_grid=True,
            indices=None,
            packed=packed,
        )

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, keep_first: bool, probes: Sequence[Tensor] = ()
    ) -> tuple["TokenBatch", list[int]]:
        """Packs the tokens that a padding mask keeps; the only host synchronisation of a forward.

        Args:
            mask: bool `(rows, columns)`, True for real tokens.
            keep_first: also compute column 0 of rows where it is padding, attended to by nobody: what a pooler reads.
            probes: integer tensors of one element each that the caller wants on the host; they ride along.

        Returns:
            The batch, and the values of `probes`.
        """
        rows, columns = mask.shape
        computed = mask
        if keep_first and columns:
            computed = mask.clone()
            computed[:, 0] = True
        lengths = computed.sum(dim=1)
        longest = lengths.amax() if rows else lengths.sum()
        holes = (computed[:, 1:] > computed[:, :-1]).sum()
        measures = (lengths.sum(), longest, mask.sum(), holes, *probes)
        tokens, max_seqlen, real_tokens, holes, *probed = torch.stack([m.reshape(()).long() for m in measures]).tolist()
        if columns and real_tokens == rows * columns:
            return cls.padded((rows, columns), mask.device, packed=True), probed

        indices = torch.nonzero_static(computed.flatten(), size=tokens).squeeze(-1)
        cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=mask.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        batch = cls(
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            longest_first=lengths.argsort(descending=True),
            columns=indices % columns,
            contiguous=holes == 0,
            sequences=indices // columns,
            key_mask=mask.flatten()[indices] if real_tokens < tokens else None,
            grid=(rows, columns),
            fills_grid=False,
            indices=indices,
            packed=True,
        )
        return batch, probed

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> "TokenBatch":
        """Input that came packed: `tokens` real tokens in one row of the grid, cut into sequences at `cu_seqlens`."""
        token = torch.arange(tokens, device=cu_seqlens.device)
        sequences = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        return cls(
            cu_seqlens=cu_seqlens.int(),
            max_seqlen=max_seqlen,
            longest_first=cu_seqlens.diff().argsort(descending=True),
            columns=token - cu_seqlens.long()[sequences],
            contiguous=True,
            sequences=sequences,
            key_mask=None,
            grid=(1, tokens),
            fills_grid=False,
            indices=None,
            packed=True,
        )

    @property
    def tokens(self) -> int:
        return self.columns.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        """`(rows, columns, ...)` to `(tokens, ...)`."""
        flat = x.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """`(tokens, ...)` to `(rows, columns, ...)`, with zeros at padding in the packed layout."""
        if self.packed and self.key_mask is not None:
            x = torch.where(self.key_mask.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))
        if self.indices is None:
            return x.unflatten(0, self.grid)
        rows, columns = self.grid
        flat = x.new_zeros((rows * columns, *x.shape[1:])).index_copy(0, self.indices, x)
        return flat.unflatten(0, self.grid)

    def first_tokens(self, x: Tensor) -> Tensor:
        """`(tokens, features)` to `(sequences, features)`: each sequence's first token, zeros where it has none."""
        if self.fills_grid:
            return x.unflatten(0, self.grid)[:, 0]
        first = self.cu_seqlens[:-1].long()
        present = self.cu_seqlens[1:] > self.cu_seqlens[:-1]
        if self.tokens == 0:
            return x.new_zeros(first.shape[0], x.shape[1])
        return torch.where(present[:, None], x[first.clamp(max=self.tokens - 1)], 0)

    def unpack_attention(self, probabilities: Tensor) -> Tensor:
        """Attention probabilities by columns of the grid, zeros where a query or a key is padding.

        Args:
            probabilities: `(sequences, heads, max_seqlen, max_seqlen)`, by the tokens' index in their sequence.

        Returns:
            `(rows, heads, columns, columns)`; for input that came packed, the argument's shape.
        """
        if self.fills_grid:
            if not self.packed or self.key_mask is None:
                return probabilities
            real = self.key_mask.view(self.grid)
        elif self.indices is None:  # the grid's one row holds all sequences: only the tails behind them are no tokens
            lengths = self.cu_seqlens.diff()
            real = torch.arange(self.max_seqlen, device=lengths.device) < lengths[:, None]
        else:
            rows, columns = self.grid
            heads = probabilities.shape[1]
            if self.max_seqlen == 0:
                return probabilities.new_zeros(rows, heads, columns, columns)
            token = torch.arange(self.tokens, device=self.columns.device)
            index = self.unpack(token - self.cu_seqlens.long()[self.sequences])
            real = self.unpack(torch.ones_like(token, dtype=torch.bool))
            by_query = probabilities.gather(2, index[:, None, :, None].expand(-1, heads, -1, self.max_seqlen))
            probabilities = by_query.gather(3, index[:, None, None, :].expand(-1, heads, columns, -1))
        return probabilities * (real[:, None, :, None] & real[:, None, None, :])
