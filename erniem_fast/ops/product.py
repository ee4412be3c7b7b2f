"""A matrix product as the op after it takes it."""

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """A matrix product on its way into an op.

    Attributes:
        x: `(tokens, features)`, floating point, the product; it includes its bias unless `bias` is given.
        bias: `(features,)`, which the op adds to x; None if there is none or x includes it.
        reusable: whether the op may write its result over x, which saves allocating memory.
    """

    x: Tensor
    bias: Tensor | None = None
    reusable: bool = False

    @property
    def value(self) -> Tensor:
        """The product with its bias, `(tokens, features)`."""
        return self.x if self.bias is None else self.x + self.bias
