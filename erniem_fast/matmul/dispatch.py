"""`F.linear` by the library that suits a call, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import flags, modes
from .fastest import FORWARD, GRAD_WEIGHT, GRAD_X, KINDS, fastest
from .libraries import LIBRARIES, TORCH, torch_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`.

    Args:
        x: `(tokens, in_features)`.
        weight, bias: `(out_features, in_features)`, and `(out_features,)` or None.
        out: memory for the result, `(tokens, out_features)`, its rows may be apart; None to allocate it. Only where
            `modes.may_write(x)`.

    Raises:
        RuntimeError: PyTorch's, for tensors that do not fit together.
    """
    if not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias))):
        return LIBRARIES[library_of(FORWARD, x, weight, bias)](x, weight, bias, out)
    libraries = {kind: library_of(kind, x, weight, bias) for kind in KINDS}
    if set(libraries.values()) == {TORCH}:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight.t(), bias, libraries)


def library_of(kind: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> str:
    """The library for a product of `x`, a key of `LIBRARIES`; PyTorch's unless it is eager, in float32, on the CPU.

    Args:
        kind: one of `KINDS`.
        x: `(tokens, in_features)`.
        weight, bias: as for `linear`; None for those that are float32 and fit x.
    """
    measured = (
        modes.is_plain_call(x)
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 2
        and x.numel() > 0
        and all(tensor is None or tensor.dtype == torch.float32 for tensor in (x, weight, bias))
        and (weight is None or (weight.numel() > 0 and weight.shape[1] == x.shape[1]))
        and may_choose()
    )
    return fastest(kind, x.shape[0]) if measured else TORCH


@flags.while_held
def may_choose() -> bool:
    """Whether the flags allow kernels, unverified, and PyTorch is not set to multiply float32 in bfloat16."""
    kernels = flags.read(flags.KERNELS) == "auto" and flags.read(flags.VERIFY) == "0"
    return kernels and torch.backends.mkldnn.matmul.fp32_precision != "bf16"


class _Linear(torch.autograd.Function):
    """Saves the tensors that `F.linear` saves, in its order and form: a checkpoint may recompute with either one."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, transposed: Tensor, bias: Tensor | None, libraries: dict[str, str]
    ) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, transposed if needs_x else None)
        ctx.libraries = libraries
        return LIBRARIES[libraries[FORWARD]](x, transposed.t(), bias, None)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, transposed = ctx.saved_tensors
        # Second derivatives, maps over gradients, and dispatch modes need PyTorch's own products.
        plain = not torch.is_grad_enabled() and modes.is_plain_call(grad)

        def multiply(kind: str, *operands: Tensor) -> Tensor:
            return (LIBRARIES[ctx.libraries[kind]] if plain else torch_linear)(*operands, None, None)

        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = multiply(GRAD_X, grad, transposed) if needs_x else None
        grad_weight = multiply(GRAD_WEIGHT, grad.t(), x.t()) if needs_weight else None
        return grad_x, grad_weight.t() if needs_weight else None, grad.sum(0) if needs_bias else None, None
