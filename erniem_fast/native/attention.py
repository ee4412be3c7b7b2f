"""`attention` on the CPU."""

from dataclasses import replace

import torch
from torch import Tensor

from ..batch import Sequences
from ..dropout import Dropout
from .function import DROPOUT, ELEMENT, FLOAT, INT, Function, dropout_values

# Both directions share one structure; each leaves out the tensors that only the other uses.
_FORWARD = Function(
    "attention_forward",
    {
        "qkv": (ELEMENT, "tokens", "3 * hidden"),
        "longest_first": (INT, "sequences"),
        "cu_seqlens": (torch.int32, "sequences + 1"),
        "key_bias": (FLOAT, "tokens"),
        "key_ranges": (torch.int32, "tokens", 2),
        "columns": DROPOUT["columns"],
        "seed": DROPOUT["seed"],
        "grad": (ELEMENT, "tokens", "hidden"),
        "out": (ELEMENT, "tokens", "hidden"),
        "grad_qkv": (ELEMENT, "tokens", "3 * hidden"),
    },
    written=("out", "grad_qkv"),
    sizes="tokens sequences hidden heads threads threshold",
    factors="scale rescale",
    optional=("key_bias", "key_ranges", "columns", "seed", "grad", "grad_qkv"),
)
_BACKWARD = replace(_FORWARD, name="attention_backward", optional=("key_bias", "key_ranges", "columns", "seed", "out"))


def forward(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None) -> Tensor:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    _FORWARD(qkv.device, qkv.dtype, out=out, **_values(qkv, sequences, heads, scale, dropout))
    return out


def backward(
    grad: Tensor, qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None
) -> Tensor:
    grad_qkv = torch.empty_like(qkv)
    values = _values(qkv, sequences, heads, scale, dropout)
    _BACKWARD(qkv.device, qkv.dtype, grad=grad, grad_qkv=grad_qkv, **values)
    return grad_qkv


def _values(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None) -> dict[str, object]:
    """The values of `_INPUTS` and of the numbers, which both directions take."""
    return {
        "qkv": qkv,
        "longest_first": sequences.longest_first,
        "cu_seqlens": sequences.cu_seqlens,
        "key_bias": sequences.key_bias,
        "key_ranges": sequences.key_ranges,
        "heads": heads,
        "threads": torch.get_num_threads(),
        "scale": scale,
        **dropout_values(dropout),
    }
