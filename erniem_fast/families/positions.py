"""The positions of RoBERTa and its descendants."""

import torch
from torch import Tensor


class CountedPositions:
    """Positions count the ids that are not padding, from `padding_idx + 1`; padding has the position `padding_idx`.

    So padding on the left and holes move them. Of embeddings it is not known which are padding: all are counted.
    """

    def default_positions(self, input_ids: Tensor | None, grid: tuple[int, int], device: torch.device) -> Tensor:
        padding_idx = self.embeddings.padding_idx
        if input_ids is None:
            return torch.arange(padding_idx + 1, padding_idx + 1 + grid[1], device=device).expand(grid)
        real = (input_ids != padding_idx).long()
        return real.cumsum(1) * real + padding_idx
