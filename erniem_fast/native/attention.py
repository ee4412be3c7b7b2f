"""`attention` on the CPU."""

import torch
from torch import Tensor

from ..batch import Sequences
from ..dropout import Dropout
from .function import DROPOUT, ELEMENT, INT, Function, dropout_values

_INPUTS = {
    "qkv": (ELEMENT, "tokens", "3 * hidden"),
    "longest_first": (INT, "sequences"),
    "cu_seqlens": (torch.int32, "sequences + 1"),
    "key_mask": (torch.bool, "tokens"),
    "columns": DROPOUT["columns"],
    "seed": DROPOUT["seed"],
}
_NUMBERS = {"sizes": "tokens sequences hidden heads threads threshold", "factors": "scale rescale"}
_OPTIONAL = ("key_mask", "columns", "seed")

_FORWARD = Function(
    "attention_forward",
    {**_INPUTS, "out": (ELEMENT, "tokens", "hidden")},
    written=("out",),
    optional=_OPTIONAL,
    **_NUMBERS,
)

_BACKWARD = Function(
    "attention_backward",
    {"grad": (ELEMENT, "tokens", "hidden"), **_INPUTS, "grad_qkv": (ELEMENT, "tokens", "3 * hidden")},
    written=("grad_qkv",),
    optional=_OPTIONAL,
    **_NUMBERS,
)


def forward(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None) -> Tensor:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    _FORWARD(
        qkv.device,
        qkv.dtype,
        qkv=qkv,
        longest_first=sequences.longest_first,
        cu_seqlens=sequences.cu_seqlens,
        key_mask=sequences.key_mask,
        out=out,
        heads=heads,
        threads=torch.get_num_threads(),
        scale=scale,
        **dropout_values(dropout),
    )
    return out


def backward(
    grad: Tensor, qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None
) -> Tensor:
    grad_qkv = torch.empty_like(qkv)
    _BACKWARD(
        qkv.device,
        qkv.dtype,
        grad=grad,
        qkv=qkv,
        longest_first=sequences.longest_first,
        cu_seqlens=sequences.cu_seqlens,
        key_mask=sequences.key_mask,
        grad_qkv=grad_qkv,
        heads=heads,
        threads=torch.get_num_threads(),
        scale=scale,
        **dropout_values(dropout),
    )
    return grad_qkv
