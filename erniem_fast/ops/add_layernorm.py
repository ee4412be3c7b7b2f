"""`add_layernorm`: LN(residual + dropout(x + bias)), the end of both halves of a layer."""

import torch
from torch import Tensor

from .. import reference
from ..batch import TokenBatch
from ..native import add_norm as native
from ..reference import wide
from .implementation import IMPLEMENTATIONS, Implementation, call, choose, differentiable, once_differentiable, run
from .layer_norm import REFERENCE, TORCH, LayerNorm, bias_of
from .native import implementation as native_implementation
from .triton import implementation as triton_implementation


def add_layernorm(
    residual: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    batch: TokenBatch,
    p: float = 0.0,
    seed: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """LN(residual + dropout(x + bias)).

    Args:
        residual, x: `(tokens, hidden)`, floating point; `x` is a matrix product without its bias.
        bias: `(hidden,)`, or None where the product has it already.
        weight, norm_bias: `(hidden,)`, of the layer norm, whose bias may be None.
        eps: added to the variance.
        batch: the tokens' coordinates, for dropout.
        p: probability of dropping an element.
        seed: int64, one element; None for no dropout.
        overwrite: lets the result take the memory of `x` where no gradient is wanted, which saves fetching it.

    Returns:
        `(tokens, hidden)` in the dtype that `residual` and `x` promote to.

    Raises:
        RuntimeError: the op's flag asks for an implementation that cannot serve this device and dtype.
    """
    name = choose("layernorm", x.device, x.dtype)
    tensors = (residual, x, bias, weight, bias_of(weight, norm_bias))
    save = differentiable(*tensors)
    inputs = (*tensors, eps, batch.columns, batch.sequences, p, seed, save)
    return call("layernorm", name, _forward, save, *inputs, overwrite=overwrite)[0]


@torch.library.custom_op("erniem_fast::add_layernorm", mutates_args=())
def _forward(
    residual: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    columns: Tensor,
    sequences: Tensor,
    p: float,
    seed: Tensor | None,
    save: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The result, and the layer norm's input `z` for the backward, empty where it is not to be saved."""
    inputs = (residual, x, bias, weight, norm_bias, eps, columns, sequences, p, seed, save)
    return run("layernorm", implementation, "forward", *inputs)


@torch.library.custom_op("erniem_fast::add_layernorm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    columns: Tensor,
    sequences: Tensor,
    p: float,
    seed: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, x, bias, weight and norm_bias; that of x is empty where it equals the residual's."""
    inputs = (grad, z, weight, eps, columns, sequences, p, seed)
    return run("layernorm", implementation, "backward", *inputs)


@_forward.register_fake
def _(residual, x, bias, weight, norm_bias, eps, columns, sequences, p, seed, save, implementation):
    out = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, x.dtype))
    return out, out.new_empty(out.shape) if save else out.new_empty(0)


@_backward.register_fake
def _(grad, z, weight, eps, columns, sequences, p, seed, implementation):
    of_x = z.new_empty(0) if seed is None else z.new_empty(z.shape)
    return z.new_empty(z.shape), of_x, *(weight.new_empty(weight.shape, dtype=wide(z.dtype)) for _ in range(3))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # what is only saved has no gradient: no zeros need be written for it
    _, _, bias, weight, _, eps, columns, sequences, p, seed, _, implementation = inputs
    ctx.save_for_backward(output[1], weight, columns, sequences, seed)
    ctx.eps, ctx.p, ctx.implementation, ctx.has_bias = eps, p, implementation, bias is not None


def _autograd(ctx, grad, _):
    z, weight, columns, sequences, seed = ctx.saved_tensors
    of_residual, of_x, of_bias, of_weight, of_norm_bias = _backward(
        grad, z, weight, ctx.eps, columns, sequences, ctx.p, seed, ctx.implementation
    )
    of_x = of_residual if seed is None else of_x
    return of_residual, of_x, of_bias if ctx.has_bias else None, of_weight, of_norm_bias, *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)
once_differentiable(_backward)


def _composite(norm: LayerNorm) -> Implementation:
    def forward(residual, x, bias, weight, norm_bias, eps, columns, sequences, p, seed, save):
        dtype = torch.promote_types(residual.dtype, x.dtype)
        x = x if bias is None else x + bias
        z = (residual + reference.feature_dropout(x, columns, sequences, p, seed)).to(dtype)
        return norm.forward(z, weight, norm_bias, eps), z if save else z.new_empty(0)

    def backward(grad, z, weight, eps, columns, sequences, p, seed):
        of_z, of_weight, of_norm_bias = norm.backward(grad, z, weight, eps)
        of_x = reference.feature_dropout(of_z, columns, sequences, p, seed)
        of_bias = of_x.sum(0, dtype=wide(z.dtype))
        return of_z, z.new_empty(0) if seed is None else of_x, of_bias, of_weight, of_norm_bias

    return Implementation(forward, backward)


IMPLEMENTATIONS["layernorm"] = {
    "triton": triton_implementation("layernorm"),
    "native": native_implementation(native.forward, native.backward, ("cpu",), native.forward_in_place),
    "torch": _composite(TORCH),
    "reference": _composite(REFERENCE),
}
