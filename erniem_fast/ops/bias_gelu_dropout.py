"""`bias_gelu_dropout`: dropout(activation(x + bias)), the middle of a layer's second half."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..batch import TokenBatch
from ..native import bias_gelu as native
from ..reference import wide
from .implementation import IMPLEMENTATIONS, Implementation, call, choose, differentiable, once_differentiable, run
from .native import implementation as native_implementation
from .triton import implementation as triton_implementation

# transformers' names of the activations that the op knows; the exact GELU is ERNIE-M's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def bias_gelu_dropout(
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    batch: TokenBatch,
    p: float = 0.0,
    seed: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """dropout(activation(x + bias)).

    Args:
        x: `(tokens, intermediate)`, floating point, a matrix product without its bias.
        bias: `(intermediate,)`, or None where the product has it already.
        activation: a value of `ACTIVATIONS`: `gelu` (exact, Hendrycks & Gimpel, arXiv 1606.08415), `gelu_tanh`
            (its approximation) or `relu`.
        batch: the tokens' coordinates, for dropout.
        p: probability of dropping an element.
        seed: int64, one element; None for no dropout.
        overwrite: lets the result take the memory of `x` where no gradient is wanted: the pages of a tensor this large
            are new at every call, and getting them costs as much as the op.

    Returns:
        `(tokens, intermediate)` in the dtype of `x`.

    Raises:
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype.
    """
    name = choose("bias_gelu", x.device, x.dtype)
    inputs = (x, bias, activation, batch.columns, batch.sequences, p, seed)
    return call("bias_gelu", name, _forward, differentiable(x, bias), *inputs, overwrite=overwrite)


@torch.library.custom_op("erniem_fast::bias_gelu_dropout", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    columns: Tensor,
    sequences: Tensor,
    p: float,
    seed: Tensor | None,
    implementation: str,
) -> Tensor:
    inputs = (x, bias, activation, columns, sequences, p, seed)
    return run("bias_gelu", implementation, "forward", *inputs)


@torch.library.custom_op("erniem_fast::bias_gelu_dropout_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    columns: Tensor,
    sequences: Tensor,
    p: float,
    seed: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias, the latter empty where there is no bias."""
    inputs = (grad, x, bias, activation, columns, sequences, p, seed)
    return run("bias_gelu", implementation, "backward", *inputs)


@_forward.register_fake
def _(x, bias, activation, columns, sequences, p, seed, implementation):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(grad, x, bias, activation, columns, sequences, p, seed, implementation):
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[1], dtype=wide(x.dtype))


def _setup_context(ctx, inputs, output):
    x, bias, ctx.activation, columns, sequences, ctx.p, seed, ctx.implementation = inputs
    ctx.save_for_backward(x, bias, columns, sequences, seed)


def _autograd(ctx, grad):
    x, bias, columns, sequences, seed = ctx.saved_tensors
    dropout = (columns, sequences, ctx.p, seed)
    of_x, of_bias = _backward(grad, x, bias, ctx.activation, *dropout, ctx.implementation)
    return of_x, None if bias is None else of_bias, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
once_differentiable(_backward)


def _activate_torch(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward_torch(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _composite(activate: Callable[..., Tensor], activate_backward: Callable[..., Tensor]) -> Implementation:
    def forward(x, bias, activation, columns, sequences, p, seed):
        x = x if bias is None else x + bias.to(x.dtype)
        return reference.feature_dropout(activate(x, activation), columns, sequences, p, seed)

    def backward(grad, x, bias, activation, columns, sequences, p, seed):
        grad = reference.feature_dropout(grad, columns, sequences, p, seed)
        pre = x if bias is None else x + bias.to(x.dtype)
        of_x = activate_backward(grad, pre, activation)
        of_bias = of_x[:, :0] if bias is None else of_x
        return of_x, of_bias.sum(0, dtype=wide(x.dtype))

    return Implementation(forward, backward)


IMPLEMENTATIONS["bias_gelu"] = {
    "triton": triton_implementation("bias_gelu_dropout"),
    "native": native_implementation(native.forward, native.backward, ("cpu",), native.forward_in_place),
    "torch": _composite(_activate_torch, _activate_backward_torch),
    "reference": _composite(reference.activate, reference.activate_backward),
}
