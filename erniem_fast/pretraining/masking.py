"""Which tokens are to be predicted, and what stands in their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ..modeling import IGNORED_LABEL
from ..tokenization import ErnieMTokenizer


@dataclass(frozen=True)
class Masking:
    """Chooses tokens at random, as BERT does (Devlin et al., arXiv 1810.04805, section 3.1).

    Special tokens and [UNK] are never chosen. ERNIE-M's paper does not say what stands in the place of chosen tokens;
    the defaults are BERT's and XLM-R's.

    Attributes:
        rate: share of the tokens that are chosen, at least one token of each text.
        mask: share of the chosen tokens that [MASK] replaces.
        random: share of the chosen tokens that a random one replaces, of the whole vocabulary; the rest stay as they
            are.

    Raises:
        ValueError: a share is not in [0, 1], or `mask` and `random` are more than 1 together.
    """

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        for name in ("rate", "mask", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share; use a number in [0, 1].")
        if self.mask + self.random > 1:
            raise ValueError(
                f"mask={self.mask} and random={self.random} are more than 1 together; the rest of the chosen tokens "
                f"stays as it is, so lower one."
            )

    def choose(self, ids: Sequence[int], tokenizer: ErnieMTokenizer, random: Random) -> list[int]:
        """The places of the tokens to be predicted, in rising order; none if there is nothing but special tokens."""
        special = set(tokenizer.all_special_ids)
        places = [place for place, each in enumerate(ids) if each not in special]
        count = min(len(places), max(1, round(self.rate * len(places))))
        return sorted(random.sample(places, count))

    def apply(self, ids: Sequence[int], tokenizer: ErnieMTokenizer, random: Random) -> tuple[list[int], list[int]]:
        """The ids with chosen tokens replaced, and the labels, -100 for tokens that were not chosen."""
        masked, labels = list(ids), [IGNORED_LABEL] * len(ids)
        for place in self.choose(ids, tokenizer, random):
            labels[place] = ids[place]
            draw = random.random()
            if draw < self.mask:
                masked[place] = tokenizer.mask_token_id
            elif draw < self.mask + self.random:
                masked[place] = random.randrange(len(tokenizer))
        return masked, labels
