"""The matrix products between the ops, behind the modules that hold their weights.

A module is called as it is unless it is a plain `nn.Linear`, so that LoRA, quantised linears and hooks keep working.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(linear: nn.Module, x: Tensor, leave_bias: bool) -> tuple[Tensor, Tensor | None]:
    """`linear(x)`, or where the next op adds the bias itself (`leave_bias`), the product and the bias apart."""
    if leave_bias and _is_plain(linear):
        return F.linear(x, linear.weight), linear.bias
    return linear(x), None


class FusedProjection:
    """Several linears on the same input, with their outputs beside each other.

    On an accelerator they are one product, whose weight is derived from theirs: made anew under autograd in training,
    and kept between calls in inference for as long as the parameters are the tensors, of the version, that it was made
    from. Writes through `parameter.data` change no version, so `forget` is called whenever the model goes from training
    to evaluation or back.

    On a CPU the linears run one by one: one wide product was no faster there (within 3 % of the three, 12 to 4,096
    tokens at base size on two AVX-512 cores), and a second copy of the weights would take 8 % more memory.
    """

    def __init__(self) -> None:
        self.forget()

    def __call__(self, linears: Sequence[nn.Module], x: Tensor) -> Tensor:
        """`(tokens, in_features)` to `(tokens, sum of out_features)`."""
        if not all(_is_plain(linear) and linear.bias is not None for linear in linears):
            return torch.cat([linear(x) for linear in linears], dim=-1)
        if x.device.type != "cpu":
            return F.linear(x, *self.weights(linears))
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return torch.cat([linear(x) for linear in linears], dim=-1)
        return _side_by_side(linears, x)

    def weights(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
        """The fused weight and bias."""
        parameters = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
        # Tensors made in inference mode do not count their versions.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            self.forget()
            return _concatenated(linears)
        made_from = [(id(each), each.data_ptr(), each._version) for each in parameters]
        # Read and written in one go: nn.DataParallel's replicas share this object between threads.
        kept = self._kept
        if kept is None or kept[0] != made_from:
            # The parameters are kept alive, so that no other tensor takes over their identity.
            self._kept = kept = (made_from, parameters, _concatenated(linears))
        return kept[2]

    def forget(self) -> None:
        self._kept: tuple[list[tuple[int, int, int]], list[Tensor], tuple[Tensor, Tensor]] | None = None

    def __getstate__(self) -> dict:
        """Copies and pickles of a model leave the derived weight behind."""
        return FusedProjection().__dict__


def _side_by_side(linears: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """The products written in place, which saves the copy that joining them would be (7 % of a ragged forward)."""
    out = x.new_empty(x.shape[0], sum(linear.out_features for linear in linears))
    for linear, place in zip(linears, out.split([linear.out_features for linear in linears], dim=1), strict=True):
        torch.addmm(linear.bias, x, linear.weight.t(), out=place)
    return out


def _concatenated(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


def _is_plain(linear: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__  # accelerate's offloading replaces it on the instance
        and not any(getattr(linear, hook) for hook in hooks)
    )
