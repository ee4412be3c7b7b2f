"""`add_norm` on the CPU."""

import torch
from torch import Tensor

from ..dropout import Dropout
from ..reference import Norm, NormScale
from .function import (
    CHUNKS,
    DROPOUT,
    ELEMENT,
    FLOAT,
    TOKENS_PER_CHUNK,
    Function,
    chunks_of,
    dropout_values,
    norm_values,
)

_FORWARD = Function(
    "add_norm_forward",
    {
        "residual": (ELEMENT, "tokens", "hidden"),
        "x": (ELEMENT, "tokens", "hidden"),
        "bias": (FLOAT, "hidden"),
        "weight": (FLOAT, "hidden"),
        "norm_bias": (FLOAT, "hidden"),
        **DROPOUT,
        "out": (ELEMENT, "tokens", "hidden"),
        "z": (ELEMENT, "tokens", "hidden"),
    },
    written=("out", "z"),
    sizes="tokens hidden threshold",
    factors="eps rescale",
    optional=("bias", *DROPOUT, "z"),
)

_BACKWARD = Function(
    "add_norm_backward",
    {
        "grad": (ELEMENT, "tokens", "hidden"),
        "z": (ELEMENT, "tokens", "hidden"),
        "weight": (FLOAT, "hidden"),
        **DROPOUT,
        "grad_residual": (ELEMENT, "tokens", "hidden"),
        "grad_x": (ELEMENT, "tokens", "hidden"),
        "sums": (FLOAT, CHUNKS, 3, "hidden"),
    },
    written=("grad_residual", "grad_x", "sums"),
    sizes="tokens tokens_per_chunk hidden threshold",
    factors="eps rescale",
    optional=(*DROPOUT, "grad_x"),
)


def forward(
    residual: Tensor,
    x: Tensor,
    bias: Tensor | None,
    norm: Norm,
    dropout: Dropout | None,
    save: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    if out is None:
        out = torch.empty_like(x, dtype=torch.promote_types(residual.dtype, x.dtype))
    z = torch.empty_like(out) if save else None
    _FORWARD(
        out.device,
        out.dtype,
        residual=residual,
        x=x,
        bias=bias,
        **norm_values(norm),
        out=out,
        z=z,
        **dropout_values(dropout),
    )
    return out, z


def forward_in_place(
    residual: Tensor, x: Tensor, bias: Tensor | None, norm: Norm, dropout: Dropout | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    fits = x.dtype == torch.promote_types(residual.dtype, x.dtype)
    return forward(residual, x, bias, norm, dropout, save, out=x if fits else None)


def backward(
    grad: Tensor, z: Tensor, norm: NormScale, dropout: Dropout | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, hidden = z.shape
    grad_residual = torch.empty_like(z)
    grad_x = None if dropout is None else torch.empty_like(z)
    sums = z.new_empty(chunks_of(tokens), 3, hidden, dtype=torch.float32)
    _BACKWARD(
        z.device,
        z.dtype,
        grad=grad,
        z=z,
        weight=norm.weight,
        grad_residual=grad_residual,
        grad_x=grad_x,
        sums=sums,
        tokens_per_chunk=TOKENS_PER_CHUNK,
        eps=norm.eps,
        **dropout_values(dropout),
    )
    grad_weight, grad_norm_bias, grad_bias = (sums[:, i].sum(0) for i in range(3))
    return grad_residual, z.new_empty(0) if grad_x is None else grad_x, grad_bias, grad_weight, grad_norm_bias
