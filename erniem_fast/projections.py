"""The matrix products between the ops, behind the modules that hold their weights.

A module is called as it is unless it is a plain `nn.Linear`, so that LoRA, quantised linears and hooks keep working.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import extension, flags, modes
from .ops.native_encoder import few_tokens

# The token counts for which the native product beats PyTorch's, measured on two cores of a Xeon with AVX-512: a forward
# at base size is 1.2 to 1.7 times as fast from 4 to 64 tokens, 1.07 times at 128, the same at 160. Up to three tokens
# are products with vectors, which MKL does better.
_FEW_TOKENS = range(4, 129)


def project(
    linear: nn.Module, x: Tensor, leave_bias: bool, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`linear(x)`, or where the next op adds the bias itself (`leave_bias`), the product and the bias apart.

    A plain linear writes its product into `scratch` where that is given.
    """
    if not is_plain(linear, nn.Linear):
        return linear(x), None
    few = takes_few_tokens(x, linear.weight)
    out = _rows(scratch, x, linear.out_features) if few or scratch is not None else None
    if few:
        few_tokens(out, x, linear.weight, linear.bias)
        return out, None
    bias, left = (None, linear.bias) if leave_bias else (linear.bias, None)
    return F.linear(x, linear.weight, bias) if out is None else _linear_into(out, x, linear.weight, bias), left


def project_side_by_side(linears: Sequence[nn.Module], x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Several linears on the same input: `(tokens, in_features)` to `(tokens, sum of out_features)`.

    In training they are one product with their weights joined. In inference each writes into its columns of the result:
    nothing is copied, and no joined weight is kept. (One was, against the parameters' versions; but fused optimizers
    and writes through `parameter.data` change no version, and it went stale. Nor was one wide product faster on CPU:
    within 3 % of three from 12 to 4,096 tokens at base size.)
    """
    if not all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in linears):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    if not _takes_out(x):
        weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        return F.linear(x, weight, bias)
    widths = [linear.out_features for linear in linears]
    out = _rows(scratch, x, sum(widths))
    into = few_tokens if takes_few_tokens(x, linears[0].weight) else _linear_into
    for linear, columns in zip(linears, out.split(widths, dim=1), strict=True):
        into(columns, x, linear.weight, linear.bias)
    return out


def scratch_for(x: Tensor, width: int) -> Tensor | None:
    """Memory for the products of `x` with up to `width` features, one after another; None where they want their own.

    The pages of tensors this large are new at every call, and to get them took 5 % of a forward on a CPU.
    """
    return x.new_empty(x.shape[0] * width) if _takes_out(x) else None


def _rows(scratch: Tensor | None, x: Tensor, width: int) -> Tensor:
    """`(tokens, width)`, of the scratch where there is one that fits: somebody may have put in a wider linear."""
    size = x.shape[0] * width
    fits = scratch is not None and (scratch.dtype, scratch.device) == (x.dtype, x.device) and size <= scratch.numel()
    return scratch[:size].view(-1, width) if fits else x.new_empty(x.shape[0], width)


def _takes_out(x: Tensor) -> bool:
    """Whether a product of `x` may be written into given memory: autograd, autocast and graphs want their own."""
    followed = torch.is_grad_enabled() or modes.is_transformed() or modes.is_recorded()
    return not (followed or torch.is_autocast_enabled(x.device.type))


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def takes_few_tokens(x: Tensor, weight: Tensor) -> bool:
    """Whether the native product serves, and is faster: in inference on the CPU, where it is built."""
    return (
        _takes_out(x)
        and x.shape[0] in _FEW_TOKENS
        and type(x) is Tensor  # not a fake one, which has no memory
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and _has_native_product()
    )


@flags.while_held
def _has_native_product() -> bool:
    return flags.read(flags.KERNELS) == "auto" and extension.is_built("cpu")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does nothing but what its kind does, so that its parameters say it all."""
    return is_untouched(module, kind) and type(module.weight) in (nn.Parameter, Tensor)  # not quantised or sharded


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs the forward of its kind and nothing else, so that other code can stand for it.

    Never in a graph that is made for elsewhere, where only the module's own operators are known.
    """
    return (
        not modes.is_exported()
        and type(module) is kind
        and "forward" not in module.__dict__  # accelerate's offloading replaces it on the instance
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )
