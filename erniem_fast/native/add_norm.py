"""`add_norm` on the CPU."""

import torch

from .function import (
    CHUNKS,
    DROPOUT,
    ELEMENT,
    FLOAT,
    TOKENS_PER_CHUNK,
    Function,
    chunks_of,
    dropout_values,
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


def forward(residual, x, *rest):
    dtype = torch.promote_types(residual.dtype, x.dtype)
    return _forward_into(torch.empty_like(x, dtype=dtype), residual, x, *rest)


def forward_in_place(residual, x, *rest):
    if x.dtype != torch.promote_types(residual.dtype, x.dtype):
        return forward(residual, x, *rest)
    return _forward_into(x, residual, x, *rest)


def _forward_into(out, residual, x, bias, weight, norm_bias, eps, columns, sequence_ids, p, seed, save):
    z = torch.empty_like(out) if save else None
    _FORWARD(
        out.device,
        out.dtype,
        residual=residual,
        x=x,
        bias=bias,
        weight=weight,
        norm_bias=norm_bias,
        out=out,
        z=z,
        eps=eps,
        **dropout_values(columns, sequence_ids, p, seed),
    )
    return out, out.new_empty(0) if z is None else z


def backward(grad, z, weight, eps, columns, sequence_ids, p, seed):
    tokens, hidden = z.shape
    grad_residual = torch.empty_like(z)
    grad_x = None if seed is None else torch.empty_like(z)
    sums = z.new_empty(chunks_of(tokens), 3, hidden, dtype=torch.float32)
    _BACKWARD(
        z.device,
        z.dtype,
        grad=grad,
        z=z,
        weight=weight,
        grad_residual=grad_residual,
        grad_x=grad_x,
        sums=sums,
        tokens_per_chunk=TOKENS_PER_CHUNK,
        eps=eps,
        **dropout_values(columns, sequence_ids, p, seed),
    )
    grad_weight, grad_norm_bias, grad_bias = (sums[:, i].sum(0) for i in range(3))
    return grad_residual, z.new_empty(0) if grad_x is None else grad_x, grad_bias, grad_weight, grad_norm_bias
