"""The matrix products between the ops, behind the modules that hold their weights.

A module is called as it is unless it is a plain `nn.Linear`, so that LoRA, quantised linears and hooks keep working.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import extension, flags
from .ops.native_encoder import few_tokens

# The token counts for which the native product beats PyTorch's, measured on two cores of a Xeon with AVX-512 at base
# size: 1.3 to 1.7 times as fast from 8 to 64 tokens. One token alone is a product with a vector, which MKL does better.
_FEW_TOKENS = range(4, 65)


def project(linear: nn.Module, x: Tensor, leave_bias: bool) -> tuple[Tensor, Tensor | None]:
    """`linear(x)`, or where the next op adds the bias itself (`leave_bias`), the product and the bias apart."""
    if not is_plain(linear, nn.Linear):
        return linear(x), None
    if _takes_few_tokens(x, linear.weight):
        out = x.new_empty(x.shape[0], linear.out_features)
        few_tokens(x, linear.weight, linear.bias, out)
        return out, None
    if leave_bias:
        return F.linear(x, linear.weight), linear.bias
    return F.linear(x, linear.weight, linear.bias), None


def project_side_by_side(linears: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Several linears on the same input: `(tokens, in_features)` to `(tokens, sum of out_features)`.

    In training they are one product with their weights joined. In inference each writes into its columns of the result:
    nothing is copied, and no joined weight is kept. (One was, against the parameters' versions; but fused optimizers
    and writes through `parameter.data` change no version, and it went stale. Nor was one wide product faster on CPU:
    within 3 % of three from 12 to 4,096 tokens at base size.)
    """
    if not all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in linears):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        return F.linear(x, weight, bias)
    widths = [linear.out_features for linear in linears]
    out = x.new_empty(x.shape[0], sum(widths))
    few = _takes_few_tokens(x, linears[0].weight)
    for linear, columns in zip(linears, out.split(widths, dim=1), strict=True):
        if few:
            few_tokens(x, linear.weight, linear.bias, columns)
        else:
            torch.addmm(linear.bias, x, linear.weight.t(), out=columns)
    return out


def _takes_few_tokens(x: Tensor, weight: Tensor) -> bool:
    """Whether the native product serves, and is faster: in inference on the CPU, where it is built."""
    return (
        x.shape[0] in _FEW_TOKENS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and flags.read(flags.KERNELS) == "auto"
        and extension.is_built("cpu")
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does nothing but what its kind does, so that its parameters say it all."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(module) is kind
        and type(module.weight) in (nn.Parameter, Tensor)  # not one that is quantised or sharded
        and "forward" not in module.__dict__  # accelerate's offloading replaces it on the instance
        and not any(getattr(module, hook) for hook in hooks)
        and not _has_any_global_hook()
    )
