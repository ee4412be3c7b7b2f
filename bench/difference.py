"""How far two results are apart; nothing is timed whose result is wrong."""

from torch import Tensor


def difference(output: Tensor, reference: Tensor) -> float:
    """Largest difference over the root mean square of `reference`; infinite where shapes differ."""
    if output.shape != reference.shape:
        return float("inf")
    return ((output - reference).abs().max() / reference.double().square().mean().sqrt()).item()
