"""The positions of RoBERTa and its descendants."""

import torch
from torch import Tensor


class CountedPositions:
    """Positions count the ids that are not padding, from `padding_idx + 1`; padding has the position `padding_idx`.

    So padding on the left and holes move them. Of embeddings it is not known which are padding: all are counted.
    """

    @property
    def first_position(self) -> int:
        return self.embeddings.padding_idx + 1

    def default_positions(self, input_ids: Tensor | None, grid: tuple[int, int], device: torch.device) -> Tensor:
        first = self.first_position
        if input_ids is None:
            return torch.arange(first, first + grid[1], device=device).expand(grid)
        real = (input_ids != self.embeddings.padding_idx).long()
        return real.cumsum(1) * real + first - 1
