"""The `native` implementations of the ops inside a layer, and the matrix product of few tokens: on the CPU only."""

from dataclasses import replace

import torch
from torch import Tensor

from ..reference import wide
from .native import DROPOUT, ELEMENT, FLOAT, INT, TOKENS_PER_CHUNK, Function, dropout, implementation, seed_and_rate

# As csrc/bias_gelu_dropout_cpu.cpp numbers them.
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}

_BIAS_GELU = Function(
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
    optional=("bias", "seed"),
)

_BIAS_GELU_BACKWARD = Function(
    "bias_gelu_backward",
    {
        "grad": (ELEMENT, "tokens", "features"),
        "x": (ELEMENT, "tokens", "features"),
        "bias": (FLOAT, "features"),
        **DROPOUT,
        "of_x": (ELEMENT, "tokens", "features"),
        "of_bias": (FLOAT, "chunks", "features"),
    },
    written=("of_x", "of_bias"),
    sizes="tokens chunks tokens_per_chunk features activation threshold",
    factors="rescale",
    optional=("bias", "seed", "of_bias"),
)

_ADD_LAYERNORM = Function(
    "add_layernorm_forward",
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
    optional=("bias", "seed", "z"),
)

_ADD_LAYERNORM_BACKWARD = Function(
    "add_layernorm_backward",
    {
        "grad": (ELEMENT, "tokens", "hidden"),
        "z": (ELEMENT, "tokens", "hidden"),
        "weight": (FLOAT, "hidden"),
        **DROPOUT,
        "of_residual": (ELEMENT, "tokens", "hidden"),
        "of_x": (ELEMENT, "tokens", "hidden"),
        "sums": (FLOAT, "chunks", 3, "hidden"),
    },
    written=("of_residual", "of_x", "sums"),
    sizes="tokens chunks tokens_per_chunk hidden threshold",
    factors="eps rescale",
    optional=("seed", "of_x"),
)

# One function, which takes `grad` for a sign that it is to run backwards.
_ATTENTION = Function(
    "attention",
    {
        "qkv": (ELEMENT, "tokens", "width"),
        "longest_first": (INT, "sequences"),
        "cu_seqlens": (torch.int32, "bounds"),
        "columns": (INT, "tokens"),
        "key_mask": (torch.bool, "tokens"),
        "seed": (INT, 1),
        "grad": (ELEMENT, "tokens", "hidden"),
        "out": (ELEMENT, "tokens", "hidden"),
        "of_qkv": (ELEMENT, "tokens", "width"),
    },
    written=("out", "of_qkv"),
    sizes="tokens sequences bounds width hidden heads head_dim threads threshold",
    factors="scale rescale",
    optional=("key_mask", "seed", "grad", "of_qkv"),
)
_ATTENTION_BACKWARD = replace(_ATTENTION, optional=("key_mask", "seed", "out"))

_FEW_TOKENS = Function(
    "few_tokens",
    {
        "x": (FLOAT, "tokens", "in_features"),
        "weight": (FLOAT, "out_features", "in_features"),
        "bias": (FLOAT, "out_features"),
        "out": (FLOAT, "tokens", "out_features"),
    },
    written=("out",),
    sizes="tokens in_features out_features out_stride",
    optional=("bias",),
    strided=("out",),
)


def _bias_gelu_forward(x, *rest):
    return _bias_gelu_into(torch.empty_like(x), x, *rest)


def _bias_gelu_in_place(x, *rest):
    return _bias_gelu_into(x, x, *rest)


def _bias_gelu_into(out, x, bias, activation, columns, sequences, p, seed):
    tokens, features = x.shape
    _BIAS_GELU(
        x.device,
        x.dtype,
        x=x,
        bias=bias,
        out=out,
        tokens=tokens,
        features=features,
        activation=ACTIVATIONS[activation],
        **dropout(columns, sequences, p, seed),
    )
    return out


def _bias_gelu_backward(grad, x, bias, activation, columns, sequences, p, seed):
    tokens, features = x.shape
    of_x = torch.empty_like(x)
    chunks = -(-tokens // TOKENS_PER_CHUNK)
    of_bias = None if bias is None else x.new_empty(chunks, features, dtype=torch.float32)
    _BIAS_GELU_BACKWARD(
        x.device,
        x.dtype,
        grad=grad,
        x=x,
        bias=bias,
        of_x=of_x,
        of_bias=of_bias,
        tokens=tokens,
        chunks=chunks,
        tokens_per_chunk=TOKENS_PER_CHUNK,
        features=features,
        activation=ACTIVATIONS[activation],
        **dropout(columns, sequences, p, seed),
    )
    return of_x, x.new_empty(0, dtype=wide(x.dtype)) if bias is None else of_bias.sum(0)


def _add_layernorm_forward(residual, x, *rest):
    dtype = torch.promote_types(residual.dtype, x.dtype)
    return _add_layernorm_into(torch.empty_like(x, dtype=dtype), residual, x, *rest)


def _add_layernorm_in_place(residual, x, *rest):
    if x.dtype != torch.promote_types(residual.dtype, x.dtype):
        return _add_layernorm_forward(residual, x, *rest)
    return _add_layernorm_into(x, residual, x, *rest)


def _add_layernorm_into(out, residual, x, bias, weight, norm_bias, eps, columns, sequences, p, seed, save):
    tokens, hidden = x.shape
    z = torch.empty_like(out) if save else None
    _ADD_LAYERNORM(
        out.device,
        out.dtype,
        residual=residual,
        x=x,
        bias=bias,
        weight=weight,
        norm_bias=norm_bias,
        out=out,
        z=z,
        tokens=tokens,
        hidden=hidden,
        eps=eps,
        **dropout(columns, sequences, p, seed),
    )
    return out, out.new_empty(0) if z is None else z


def _add_layernorm_backward(grad, z, weight, eps, columns, sequences, p, seed):
    tokens, hidden = z.shape
    of_residual = torch.empty_like(z)
    of_x = None if seed is None else torch.empty_like(z)
    chunks = -(-tokens // TOKENS_PER_CHUNK)
    sums = z.new_empty(chunks, 3, hidden, dtype=torch.float32)
    _ADD_LAYERNORM_BACKWARD(
        z.device,
        z.dtype,
        grad=grad,
        z=z,
        weight=weight,
        of_residual=of_residual,
        of_x=of_x,
        sums=sums,
        tokens=tokens,
        chunks=chunks,
        tokens_per_chunk=TOKENS_PER_CHUNK,
        hidden=hidden,
        eps=eps,
        **dropout(columns, sequences, p, seed),
    )
    of_weight, of_norm_bias, of_bias = (sums[:, i].sum(0) for i in range(3))
    return of_residual, z.new_empty(0) if of_x is None else of_x, of_bias, of_weight, of_norm_bias


def _attention_forward(
    qkv, longest_first, contiguous, cu_seqlens, max_seqlen, columns, sequences, key_mask, heads, scale, p, seed
):
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    _attend(qkv, longest_first, cu_seqlens, columns, key_mask, heads, scale, p, seed, out=out)
    return out, qkv.new_empty(0, dtype=torch.float32)


def _attention_backward(
    grad,
    out,
    saved,
    qkv,
    longest_first,
    contiguous,
    cu_seqlens,
    max_seqlen,
    columns,
    sequences,
    key_mask,
    heads,
    scale,
    p,
    seed,
):
    of_qkv = torch.empty_like(qkv)
    _attend(qkv, longest_first, cu_seqlens, columns, key_mask, heads, scale, p, seed, grad=grad, of_qkv=of_qkv)
    return of_qkv


def _attend(
    qkv, longest_first, cu_seqlens, columns, key_mask, heads, scale, p, seed, grad=None, out=None, of_qkv=None
) -> None:
    tokens, width = qkv.shape
    (_ATTENTION if grad is None else _ATTENTION_BACKWARD)(
        qkv.device,
        qkv.dtype,
        qkv=qkv,
        longest_first=longest_first,
        cu_seqlens=cu_seqlens,
        columns=columns,
        key_mask=key_mask,
        grad=grad,
        out=out,
        of_qkv=of_qkv,
        tokens=tokens,
        sequences=len(longest_first),
        bounds=len(cu_seqlens),
        width=width,
        hidden=width // 3,
        heads=heads,
        head_dim=width // (3 * heads),
        threads=torch.get_num_threads(),
        scale=scale,
        **seed_and_rate(p, seed),
    )


def few_tokens(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Writes `F.linear(x, weight, bias)` into `out`, whose rows may lie apart; float32.

    Args:
        out: `(tokens, out_features)`.
        x: `(tokens, in_features)`, a few tens of tokens: with more of them PyTorch's product is faster.
        weight, bias: `(out_features, in_features)`, and `(out_features,)` or None.
    """
    tokens, in_features = x.shape
    _FEW_TOKENS(
        x.device,
        x.dtype,
        x=x,
        weight=weight,
        bias=bias,
        out=out,
        tokens=tokens,
        in_features=in_features,
        out_features=weight.shape[0],
        out_stride=out.stride(0),
    )


BIAS_GELU = implementation(_bias_gelu_forward, _bias_gelu_backward, ("cpu",), _bias_gelu_in_place)
ATTENTION = implementation(_attention_forward, _attention_backward, ("cpu",))
ADD_LAYERNORM = implementation(_add_layernorm_forward, _add_layernorm_backward, ("cpu",), _add_layernorm_in_place)
