"""The matrix products between the ops, behind the modules that hold their weights.

A module that is not a plain `nn.Linear` is called as it is, so that LoRA, quantised linears and hooks keep working. Our
own inference modules are called too, but their results are new memory, which ops may reuse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import ops
from .inference import is_plain_inference
from .inference_gpu import project_as_one
from .matmul import linear as multiply
from .modes import is_plain, may_write
from .ops import Product


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
        return Product(linear(x), reusable=is_plain_inference(linear) and not torch.is_grad_enabled())
    weight, bias = _parameters(linear)
    left_to_op = bias if into is not None and ops.fuses_bias(into, x) else None
    out = None if scratch is None else _rows(scratch, x, weight.shape[0])
    reusable = not torch.is_grad_enabled()  # a backward may need the product
    return Product(multiply(x, weight, bias if left_to_op is None else None, out), left_to_op, reusable)


def project_side_by_side(linears: Sequence[nn.Module], x: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Queries, keys and values side by side: `(tokens, in_features)` to `(tokens, 3 · out_features)`.

    In training and on a GPU, one product with the joined weights computes them: on an H200, a forward of 63,241 tokens
    at base size took 25.9 ms so, and 29.4 ms with three products. In inference on a CPU, each linear writes into its
    columns of the result: nothing is copied, and no joined weight is kept. (A joined weight was once cached together
    with the parameters' versions, but fused optimizers and writes through `parameter.data` do not change a version, and
    the cache went stale. One wide product was not faster on a CPU either: within 3 % of three from 12 to 4,096 tokens
    at base size.)

    Raises:
        ValueError: the linears have different numbers of features, or the lengths of a bias and its weight differ.
    """
    plain = all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in linears)
    if not plain:
        product = project_as_one(linears, x)
        if product is not None:
            return product
    parameters = [_parameters(linear) for linear in linears] if plain else []
    # Joining parameters of different dtypes would promote them silently.
    if len({parameter.dtype for pair in parameters for parameter in pair}) != 1:
        products = [linear(x) for linear in linears]
        _check_widths([product.shape[-1] for product in products])
        return torch.cat(products, dim=-1)
    widths = [weight.shape[0] for weight, _ in parameters]
    _check_widths(widths)
    if x.device.type != "cpu" or not may_write(x):
        weights, biases = zip(*parameters, strict=True)
        return multiply(x, torch.cat(weights), torch.cat(biases))
    out = _rows(scratch, x, sum(widths))
    for columns, (weight, bias) in zip(out.split(widths, dim=1), parameters, strict=True):
        multiply(x, weight, bias, columns)
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
