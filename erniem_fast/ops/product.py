"""What an op takes from the matrix product before it."""

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """A matrix product on its way into an op.

    Attributes:
        x: `(tokens, features)`, the product, with its bias unless that is left to the op.
        bias: `(features,)`, for the op to add; None if there is none, or x has it.
        reusable: whether the op may write its result over x, which saves fetching fresh memory.
    """

    x: Tensor
    bias: Tensor | None = None
    reusable: bool = False

    @property
    def value(self) -> Tensor:
        """The product with its bias."""
        return self.x if self.bias is None else self.x + self.bias
