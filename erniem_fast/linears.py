"""The matrix products between the ops, behind the modules that hold their weights.

A module that is not a plain `nn.Linear` is called as it is, so that LoRA, quantised linears and hooks keep working.
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

# The numbers of tokens for which the native product is faster than PyTorch's, measured on two cores of a Xeon with
# AVX-512: a forward at base size is 1.2 to 1.7 times as fast from 4 to 64 tokens, 1.07 times at 128, the same at 160.
# Products of up to three tokens are products with vectors, which MKL does better.
_FEW_TOKENS = range(4, 129)
# With SSE vectors alone, the native product takes two to three times as long as MKL's, which finds better vectors by
# itself.
_CAPABILITIES = ("AVX2", "AVX512")


class Scratch:
    """Memory that one product after another may use.

    It is not a tensor because layers take it as an argument: tensors that hooks of layers receive must not change.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


def project(linear: nn.Module, x: Tensor, into: str | None = None, scratch: Scratch | None = None) -> Product:
    """`linear(x)` on its way into an op.

    Args:
        linear: the module; a plain linear's bias is left to the op if that is cheaper.
        x: `(tokens, in_features)`, floating point.
        into: the op, a key of `flags.OPS`; None if no op is to add the bias.
        scratch: memory for a plain linear's product; None to allocate it.

    Returns:
        The product, `(tokens, out_features)`, and the bias if it is left to the op.

    Raises:
        ValueError: the lengths of a plain linear's bias and weight differ.
    """
    if not is_plain(linear, nn.Linear):
        return Product(linear(x))
    weight, bias = _parameters(linear)
    few = takes_few_tokens(x, weight, bias)
    out = _rows(scratch, x, weight.shape[0]) if few or scratch is not None else None
    reusable = not torch.is_grad_enabled()  # a backward may need the product
    if few:
        native_linear(out, x, weight, bias)
        return Product(out, None, reusable)
    left_to_op = bias if into is not None and ops.fuses_bias(into, x) else None
    bias = bias if left_to_op is None else None
    product = F.linear(x, weight, bias) if out is None else _linear_into(out, x, weight, bias)
    return Product(product, left_to_op, reusable)


def project_side_by_side(linears: Sequence[nn.Module], x: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Queries, keys and values side by side: `(tokens, in_features)` to `(tokens, 3 · out_features)`.

    In training, one product with the joined weights computes them. In inference, each linear writes into its columns of
    the result: nothing is copied, and no joined weight is kept. (A joined weight was once cached together with the
    parameters' versions, but fused optimizers and writes through `parameter.data` do not change a version, and the
    cache went stale. One wide product was not faster on a CPU either: within 3 % of three from 12 to 4,096 tokens at
    base size.)

    Raises:
        ValueError: the linears have different numbers of features, or the lengths of a bias and its weight differ.
    """
    plain = all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in linears)
    parameters = [_parameters(linear) for linear in linears] if plain else []
    # Joining parameters of different dtypes would promote them silently.
    if len({parameter.dtype for pair in parameters for parameter in pair}) != 1:
        products = [linear(x) for linear in linears]
        _check_widths([product.shape[-1] for product in products])
        return torch.cat(products, dim=-1)
    widths = [weight.shape[0] for weight, _ in parameters]
    _check_widths(widths)
    if not may_write(x):
        weights, biases = zip(*parameters, strict=True)
        return F.linear(x, torch.cat(weights), torch.cat(biases))
    out = _rows(scratch, x, sum(widths))
    into = native_linear if takes_few_tokens(x, *parameters[0]) else _linear_into
    for columns, (weight, bias) in zip(out.split(widths, dim=1), parameters, strict=True):
        into(columns, x, weight, bias)
    return out


def _check_widths(widths: list[int]) -> None:
    """Refuses different widths, because their sum could still be divisible into three equal parts."""
    if any(width != widths[0] for width in widths):
        raise ValueError(
            f"queries, keys and values have {', '.join(map(str, widths))} features, but attention needs the same "
            f"number of each; give q_proj, k_proj and v_proj the same number of output features."
        )


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a plain linear. Only they tell its size, because its attributes may be out of date."""
    weight, bias = linear.weight, linear.bias
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a linear has a weight of shape {tuple(weight.shape)}, but a bias of shape {tuple(bias.shape)}; the bias "
            f"must have shape {tuple(weight.shape[:1])}: prune it like the weight."
        )
    return weight, bias


def scratch_for(x: Tensor, width: int) -> Scratch | None:
    """Memory for products of `x` with up to `width` features, one after another; None if it may not be written into.

    Tensors this large get new pages at every call, which took 5 % of a forward on a CPU.
    """
    return Scratch(x.new_empty(x.shape[0] * width)) if may_write(x) else None


def _rows(scratch: Scratch | None, x: Tensor, width: int) -> Tensor:
    """Memory for `(tokens, width)`: the scratch if it fits, which it does not for a linear wider than the config's."""
    size, memory = x.shape[0] * width, None if scratch is None else scratch.memory
    fits = memory is not None and (memory.dtype, memory.device) == (x.dtype, x.device) and size <= memory.numel()
    return memory[:size].view(x.shape[0], width) if fits else x.new_empty(x.shape[0], width)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def takes_few_tokens(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the native product can be used and is faster: for few tokens, in inference on the CPU in float32."""
    return (
        may_write(x)
        and x.shape[0] in _FEW_TOKENS
        and type(x) is Tensor  # a fake tensor has no memory
        and x.device.type == "cpu"
        and all(tensor is None or tensor.dtype == torch.float32 for tensor in (x, *parameters))
        and _has_native_product()
    )


@flags.while_held
def _has_native_product() -> bool:
    capable = torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
    return capable and flags.read(flags.KERNELS) == "auto" and library.is_built("cpu")
