"""The matrix products between the ops, behind the modules that hold their weights.

A module is called as it is unless it is a plain `nn.Linear`, so that LoRA, quantised linears and hooks keep working.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flags, ops
from .modes import is_plain, may_write
from .native import library
from .native.linear import forward as native_linear
from .ops import Product

# The token counts for which the native product beats PyTorch's, measured on two cores of a Xeon with AVX-512: a forward
# at base size is 1.2 to 1.7 times as fast from 4 to 64 tokens, 1.07 times at 128, the same at 160. Up to three tokens
# are products with vectors, which MKL does better.
_FEW_TOKENS = range(4, 129)
# With the vectors of SSE alone it takes twice to three times as long as MKL, which looks for better ones by itself.
_CAPABILITIES = ("AVX2", "AVX512")


class Scratch:
    """Memory that products take one after another.

    It is no tensor, because layers are given it: a tensor that their hooks are given must stay as it is.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


def project(linear: nn.Module, x: Tensor, into: str | None = None, scratch: Scratch | None = None) -> Product:
    """`linear(x)` on its way into an op.

    Args:
        linear: the module; a plain linear's bias is left to the op where that is cheaper.
        x: `(tokens, in_features)`.
        into: the op, a key of `flags.OPS`; None leaves no bias.
        scratch: memory for a plain linear's product.

    Raises:
        ValueError: a plain linear has a bias of another length than its weight says.
    """
    if not is_plain(linear, nn.Linear):
        return Product(linear(x))
    weight, bias = _parameters(linear)
    few = takes_few_tokens(x, weight, bias)
    out = _rows(scratch, x, weight.shape[0]) if few or scratch is not None else None
    reusable = not torch.is_grad_enabled()  # else a gradient may need it
    if few:
        native_linear(out, x, weight, bias)
        return Product(out, None, reusable)
    left = bias if into is not None and ops.fuses_bias(into, x) else None
    bias = bias if left is None else None
    return Product(F.linear(x, weight, bias) if out is None else _linear_into(out, x, weight, bias), left, reusable)


def project_side_by_side(linears: Sequence[nn.Module], x: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Queries, keys and values side by side: `(tokens, in_features)` to `(tokens, 3 · out_features)`.

    In training they are one product with their weights joined. In inference each writes into its columns of the result:
    nothing is copied, and no joined weight is kept. (One was, against the parameters' versions; but fused optimizers
    and writes through `parameter.data` change no version, and it went stale. Nor was one wide product faster on CPU:
    within 3 % of three from 12 to 4,096 tokens at base size.)

    Raises:
        ValueError: the linears have different numbers of features, or a bias of another length than its weight says.
    """
    plain = all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in linears)
    parameters = [_parameters(linear) for linear in linears] if plain else []
    # Joined, parameters of several dtypes would be promoted in silence.
    if len({each.dtype for pair in parameters for each in pair}) != 1:
        products = [linear(x) for linear in linears]
        _check_widths([product.shape[-1] for product in products])
        return torch.cat(products, dim=-1)
    widths = [weight.shape[0] for weight, _ in parameters]
    _check_widths(widths)
    if not may_write(x):
        return F.linear(x, *(torch.cat(each) for each in zip(*parameters, strict=True)))
    out = _rows(scratch, x, sum(widths))
    into = native_linear if takes_few_tokens(x, *parameters[0]) else _linear_into
    for columns, (weight, bias) in zip(out.split(widths, dim=1), parameters, strict=True):
        into(columns, x, weight, bias)
    return out


def _check_widths(widths: list[int]) -> None:
    """Other widths could add up to three equal parts, too."""
    if any(width != widths[0] for width in widths):
        raise ValueError(
            f"queries, keys and values have {', '.join(map(str, widths))} features, but attention needs as many of "
            f"each; cut q_proj, k_proj and v_proj alike."
        )


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a plain linear; they say its size, for its attributes may be older than they are."""
    weight, bias = linear.weight, linear.bias
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a linear has a weight of shape {tuple(weight.shape)}, but a bias of shape {tuple(bias.shape)}; the bias "
            f"must have shape {tuple(weight.shape[:1])}: cut it as the weight was cut."
        )
    return weight, bias


def scratch_for(x: Tensor, width: int) -> Scratch | None:
    """Memory for the products of `x` with up to `width` features, one after another; None where they want their own.

    The pages of tensors this large are new at every call, and to get them took 5 % of a forward on a CPU.
    """
    return Scratch(x.new_empty(x.shape[0] * width)) if may_write(x) else None


def _rows(scratch: Scratch | None, x: Tensor, width: int) -> Tensor:
    """`(tokens, width)`, of the scratch where there is one that fits: another linear may be wider than the config's."""
    size, memory = x.shape[0] * width, None if scratch is None else scratch.memory
    fits = memory is not None and (memory.dtype, memory.device) == (x.dtype, x.device) and size <= memory.numel()
    return memory[:size].view(x.shape[0], width) if fits else x.new_empty(x.shape[0], width)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def takes_few_tokens(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the native product serves, and is faster: in inference on the CPU, where it is built."""
    return (
        may_write(x)
        and x.shape[0] in _FEW_TOKENS
        and type(x) is Tensor  # not a fake one, which has no memory
        and x.device.type == "cpu"
        and all(each is None or each.dtype == torch.float32 for each in (x, *parameters))
        and _has_native_product()
    )


@flags.while_held
def _has_native_product() -> bool:
    capable = torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
    return capable and flags.read(flags.KERNELS) == "auto" and library.is_built("cpu")
