"""`bias_gelu` on the CPU."""

import torch
from torch import Tensor

from ..dropout import Dropout
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

# The numbers of `Activation` in csrc/ops.h.
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}

_FORWARD = Function(
    "bias_gelu_forward",
    {
        "x": (ELEMENT, "tokens", "features"),
        "bias": (FLOAT, "features"),
        **DROPOUT,
        "out": (ELEMENT, "tokens", "features"),
    },
    written=("out",),
    sizes="tokens features activation threshold",
    factors="rescale",
    optional=("bias", *DROPOUT),
)

_BACKWARD = Function(
    "bias_gelu_backward",
    {
        "grad": (ELEMENT, "tokens", "features"),
        "x": (ELEMENT, "tokens", "features"),
        "bias": (FLOAT, "features"),
        **DROPOUT,
        "grad_x": (ELEMENT, "tokens", "features"),
        "grad_bias": (FLOAT, CHUNKS, "features"),
    },
    written=("grad_x", "grad_bias"),
    sizes="tokens tokens_per_chunk features activation threshold",
    factors="rescale",
    optional=("bias", *DROPOUT, "grad_bias"),
)


def forward(
    x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None, out: Tensor | None = None
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    _FORWARD(
        x.device,
        x.dtype,
        x=x,
        bias=bias,
        out=out,
        activation=ACTIVATIONS[activation],
        **dropout_values(dropout),
    )
    return out


def forward_in_place(x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None) -> Tensor:
    return forward(x, bias, activation, dropout, out=x)


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    grad_x = torch.empty_like(x)
    grad_bias = None if bias is None else x.new_empty(chunks_of(tokens), features, dtype=torch.float32)
    _BACKWARD(
        x.device,
        x.dtype,
        grad=grad,
        x=x,
        bias=bias,
        grad_x=grad_x,
        grad_bias=grad_bias,
        tokens_per_chunk=TOKENS_PER_CHUNK,
        activation=ACTIVATIONS[activation],
        **dropout_values(dropout),
    )
    return grad_x, x.new_empty(0, dtype=torch.float32) if bias is None else grad_bias.sum(0)
