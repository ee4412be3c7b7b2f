"""A layer's forward and backward by Triton's kernels and PyTorch's products, as one function of autograd.

Op by op, autograd would hold eight functions for a layer, each with checks of its own, and add gradients up in kernels
of their own: on an H100, steps of 64 sentences took longer on the host than on the GPU
(bench/results/nvidia-h100-80gb-hbm3).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import flags, modes, ops
from .batch import Sequences, TokenBatch
from .dropout import Dropout
from .kernel_layers import LayerParameters, contiguous, kernels
from .ops import Product
from .ops.triton import on_device
from .reference import NormScale


class LayerDropouts(NamedTuple):
    """A layer's dropouts; None where none is active."""

    attention: Dropout | None
    after_attention: Dropout | None
    after_activation: Dropout | None
    after_feed_forward: Dropout | None


class _Call(NamedTuple):
    """What a call has beside the tensors that need gradients.

    Attributes:
        layer: the parameters.
        sequences: the batch's, as kernels read them.
        dropouts: the layer's, likewise.
        batch: the tokens.
        settings: the flags' values.
    """

    layer: LayerParameters
    sequences: Sequences
    dropouts: LayerDropouts
    batch: TokenBatch
    settings: flags.Settings


def run(layer: LayerParameters, x: Tensor, batch: TokenBatch, dropouts: LayerDropouts) -> Tensor:
    """The layer's result, `(tokens, hidden)`, for whose gradients one function of autograd is recorded.

    Args:
        layer: the parameters, as `KernelLayers` takes them.
        x: `(tokens, hidden)`, in the parameters' dtype and on their device.
        batch: the tokens.
        dropouts: the layer's.
    """
    sequences = Sequences._make(contiguous(batch.sequences))
    dropouts = LayerDropouts._make(each and Dropout._make(contiguous(each)) for each in dropouts)
    call = _Call(layer, sequences, dropouts, batch, flags.snapshot())
    return _Layer.apply(call, x.contiguous(), *_trained(layer))


def _trained(layer: LayerParameters) -> list[Tensor]:
    """The parameters in the order of `_Layer`'s arguments."""
    linears = (*layer.qkv, layer.out, layer.up, layer.down)
    return [part for pair in (*linears, layer.norm1[:2], layer.norm2[:2]) for part in pair]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, x: Tensor, *trained: Tensor) -> Tensor:
        layer, sequences, dropouts, *_ = call
        attention, bias_gelu, add_norm = kernels()
        with on_device(x.device):
            weights, biases = (torch.cat(parts) for parts in zip(*layer.qkv, strict=True))
            qkv = F.linear(x, weights, biases)
            context, statistics = attention.forward(qkv, sequences, layer.heads, layer.scale, dropouts.attention)
            product = F.linear(context, layer.out.weight)
            attended, z1 = add_norm.forward(
                x, product, layer.out.bias, layer.norm1, dropouts.after_attention, save=True
            )
            up = F.linear(attended, layer.up.weight)
            activated = bias_gelu.forward(up, layer.up.bias, layer.activation, dropouts.after_activation)
            product = F.linear(activated, layer.down.weight)
            out, z2 = add_norm.forward(
                attended, product, layer.down.bias, layer.norm2, dropouts.after_feed_forward, save=True
            )
        read = (weights, layer.out.weight, *layer.up, layer.down.weight)
        norms = layer.norm1.weight, layer.norm2.weight
        ctx.save_for_backward(x, qkv, context, statistics, z1, attended, up, activated, z2, *read, *norms)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or modes.is_followed((grad,)):
            return None, *_op_by_op(ctx.call, x, grad, needed)
        with on_device(x.device):
            grads = _gradients(ctx.call, grad.contiguous(), x, *saved, needed=needed)
        return None, *(each if wanted else None for each, wanted in zip(grads, needed, strict=True))


def _gradients(
    call: _Call,
    grad: Tensor,
    x: Tensor,
    qkv: Tensor,
    context: Tensor,
    statistics: Tensor,
    z1: Tensor,
    attended: Tensor,
    up: Tensor,
    activated: Tensor,
    z2: Tensor,
    *weights: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of x and of the parameters, as `_trained` orders them; None for weights that need none."""
    layer, sequences, dropouts, *_ = call
    qkv_weights, out_weight, up_weight, up_bias, down_weight, norm1, norm2 = weights
    attention, bias_gelu, add_norm = kernels()
    wanted = dict(zip(("x", "q", "", "k", "", "v", "", "out", "", "up", "", "down"), needed, strict=False))
    # The dtype of the parameters: autograd would convert gradients of another one, each in a kernel of its own.
    vectors = torch.promote_types(up_bias.dtype, norm1.dtype)

    def of_weight(name: str, grad: Tensor, x: Tensor) -> Tensor | None:
        return grad.t() @ x if wanted[name] else None

    grad_attended, grad_down, *of_down_and_norm = add_norm.backward(
        grad, z2, NormScale(norm2, layer.norm2.eps), dropouts.after_feed_forward, sums=vectors
    )
    grad_down = grad_attended if dropouts.after_feed_forward is None else grad_down
    of_down = of_weight("down", grad_down, activated)
    grad_up, of_up_bias = bias_gelu.backward(
        grad_down @ down_weight, up, up_bias, layer.activation, dropouts.after_activation
    )
    of_up = of_weight("up", grad_up, attended)
    grad_x, grad_out, *of_out_and_norm = add_norm.backward(
        grad_attended.addmm_(grad_up, up_weight),
        z1,
        NormScale(norm1, layer.norm1.eps),
        dropouts.after_attention,
        sums=vectors,
    )
    grad_out = grad_x if dropouts.after_attention is None else grad_out
    of_out = of_weight("out", grad_out, context)
    grad_qkv = attention.backward(
        grad_out @ out_weight, context, statistics, qkv, sequences, layer.heads, layer.scale, dropouts.attention
    )
    of_qkv = (grad_qkv.t() @ x).chunk(3) if any(wanted[name] for name in "qkv") else [None] * 3
    of_qkv_biases = grad_qkv.sum(0).chunk(3)
    of_down_bias, *of_norm2 = of_down_and_norm
    of_out_bias, *of_norm1 = of_out_and_norm
    return [
        grad_x.addmm_(grad_qkv, qkv_weights) if wanted["x"] else None,
        *(each for pair in zip(of_qkv, of_qkv_biases, strict=True) for each in pair),
        *(of_out, of_out_bias, of_up, of_up_bias, of_down, of_down_bias),
        *of_norm1,
        *of_norm2,
    ]


def _op_by_op(call: _Call, x: Tensor, grad: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The same gradients by ops, which run again: they refuse gradients of gradients by name, and serve maps."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), flags.held(call.settings):
        leaf = x.detach().requires_grad_(needed[0])
        out = _run_ops(call, leaf)
        inputs = [each for each, wanted in zip((leaf, *_trained(call.layer)), needed, strict=True) if wanted]
        grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=create_graph))
    return [next(grads) if wanted else None for wanted in needed]


def _run_ops(call: _Call, x: Tensor) -> Tensor:
    layer, dropouts = call.layer, call.dropouts
    qkv = F.linear(x, *(torch.cat(parts) for parts in zip(*layer.qkv, strict=True)))
    context = ops.attention(qkv, call.batch, layer.heads, layer.scale, dropouts.attention)
    product = Product(F.linear(context, layer.out.weight), layer.out.bias)
    attended = ops.add_norm(x, product, layer.norm1, dropouts.after_attention)
    product = Product(F.linear(attended, layer.up.weight), layer.up.bias)
    activated = ops.bias_gelu(product, layer.activation, dropouts.after_activation)
    product = Product(F.linear(activated, layer.down.weight), layer.down.bias)
    return ops.add_norm(attended, product, layer.norm2, dropouts.after_feed_forward)
