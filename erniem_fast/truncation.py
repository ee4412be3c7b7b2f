"""Truncation: how many tokens an example keeps, which tokens are cut off, and windows that cover all tokens."""

from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)


def sizes_to_keep(lengths: list[int], excess: int, strategy: TruncationStrategy) -> list[int]:
    """The number of tokens that each of an example's one or two sequences keeps.

    As in transformers 4.57.6, a sequence that would lose all its tokens or more is not cut: an error is logged, and the
    example stays too long. Only longest_first can empty the sequences of a pair.

    Args:
        lengths: each sequence's number of tokens.
        excess: the number of tokens to remove; zero or negative for none.
        strategy: which sequence loses them.
    """
    if excess <= 0 or strategy == TruncationStrategy.DO_NOT_TRUNCATE:
        return lengths
    if strategy == TruncationStrategy.LONGEST_FIRST and len(lengths) == 2:
        return _shorten_pair(*lengths, excess)
    index = 1 if strategy == TruncationStrategy.ONLY_SECOND else 0
    length = lengths[index] if index < len(lengths) else 0
    if length <= excess:
        logger.error(
            f"truncation={strategy.value!r} has to take {excess} tokens out of the {('first', 'second')[index]} "
            f"sequence, which has {length}: it is not cut, and the example is too long. Use a larger max_length "
            f"or another truncation."
        )
        return lengths
    return [*lengths[:index], length - excess, *lengths[index + 1 :]]


def _shorten_pair(first: int, second: int, excess: int) -> list[int]:
    """Shortens the longer sequence until both are equally long, then both in turn."""
    from_longer = min(abs(first - second), excess)
    from_first = (excess - from_longer) // 2
    from_second = excess - from_longer - from_first
    if first > second:
        from_first += from_longer
    else:
        from_second += from_longer
    return [max(first - from_first, 0), max(second - from_second, 0)]


def kept(length: int, size: int, side: str) -> slice:
    """The part that stays when truncation on `side` leaves `size` of a sequence's `length` tokens."""
    return slice(size) if side == "right" else slice(length - size, length)


def overflow(sequences: list[list], sizes: list[int], stride: int, side: str) -> list:
    """The tokens that truncation on `side` cuts off, and up to `stride` neighbouring tokens that stay."""
    tokens, other_side = [], "left" if side == "right" else "right"
    for sequence, size in zip(sequences, sizes, strict=True):
        length = len(sequence)
        if size < length:
            tokens += sequence[kept(length, min(length - size + stride, length), other_side)]
    return tokens


def windows(length: int, size: int, stride: int, side: str) -> list[slice]:
    """Windows of `size` tokens that cover a sequence; the first is the part that truncation on `side` keeps.

    Neighbours share `stride` tokens. The last window may be shorter.

    Raises:
        ValueError: `stride` is negative, or so large that a window would have no token of its own.
    """
    if size == length:
        return [slice(length)]
    if not 0 <= stride < size:
        raise ValueError(
            f"stride={stride} must be at least 0 and less than {size}, the number of tokens that a window has room "
            f"for: choose a smaller stride or a larger max_length"
        )
    starts = range(0, length - stride, size - stride)
    if side == "right":
        return [slice(start, min(start + size, length)) for start in starts]
    return [slice(max(length - start - size, 0), length - start) for start in starts]
