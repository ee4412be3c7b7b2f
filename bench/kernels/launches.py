"""What the Triton kernels are launched with on an architecture: each as the model does."""

from collections.abc import Iterator

import torch
from torch import Tensor

from erniem_fast.batch import Sequences
from erniem_fast.dropout import Dropout
from erniem_fast.kernels import add_norm, attention, bias_gelu, quantise
from erniem_fast.kernels.device import is_amd
from erniem_fast.reference import Norm

MANY = 300  # sequences, enough for the backward in one pass at any length
TOKENS = 16384  # enough for as many programs as a GPU is given; memory that is never touched costs nothing


def dropout_of(seed: Tensor | None, tokens: int) -> Dropout | None:
    columns = torch.zeros(tokens, dtype=torch.int64)
    return None if seed is None else Dropout(0.1, seed, columns, columns)


def launch_add_norm(dtype: torch.dtype, hidden: int, seed: Tensor | None, tokens: int = TOKENS) -> None:
    x, vector = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    norm, dropout = Norm(vector, vector, 1e-5), dropout_of(seed, tokens)
    add_norm.forward(x, x, vector, norm, dropout, save=True)
    add_norm.backward(x, x, norm, dropout)


def launch_plain_norm(dtype: torch.dtype, hidden: int, _: None, tokens: int = TOKENS) -> None:
    """That of the embeddings, whose dropout is not the kernel's."""
    x, vector = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    norm = Norm(vector, vector, 1e-5)
    add_norm.forward(x, None, None, norm, None, save=False)
    add_norm.backward(x, x, norm, None)


def launch_bias_gelu(dtype: torch.dtype, features: int, seed: Tensor | None, tokens: int = TOKENS) -> None:
    x, dropout = torch.zeros(tokens, features, dtype=dtype), dropout_of(seed, tokens)
    bias_gelu.forward(x, x[0], "gelu", dropout)
    bias_gelu.backward(x, x, x[0], "gelu", dropout)


def launch_quantise(
    dtype: torch.dtype, features: int, _: None, to: torch.dtype = torch.int8, tokens: int = TOKENS
) -> None:
    quantise.quantise(torch.zeros(tokens, features, dtype=dtype), to)


def launch_dequantise(dtype: torch.dtype, features: int, _: None, tokens: int = TOKENS) -> None:
    sums, scale = torch.zeros(tokens, features, dtype=torch.int32), torch.zeros(tokens, 1)
    quantise.dequantise(sums, scale, scale[:features, 0], torch.zeros(features, dtype=dtype), dtype)


def launch_attention(
    dtype: torch.dtype,
    head_dim: int,
    seed: Tensor | None,
    max_seqlen: int = 512,
    sequences: int = 1,
    key_bias: Tensor | None = None,
    key_ranges: Tensor | None = None,
) -> None:
    heads = 768 // head_dim  # the base model's hidden size
    qkv = torch.zeros(64, 3 * heads * head_dim, dtype=dtype)
    where = Sequences(
        cu_seqlens=torch.zeros(sequences + 1, dtype=torch.int32),
        max_seqlen=max_seqlen,
        longest_first=torch.zeros(sequences, dtype=torch.int64),
        contiguous=True,
        sequence_ids=torch.zeros(64, dtype=torch.int64),
        key_bias=key_bias,
        key_ranges=key_ranges,
    )
    case = (where, heads, 0.1, dropout_of(seed, 64))
    out, statistics = attention.forward(qkv, *case)
    attention.backward(out, out, statistics, qkv, *case)


def launches(arch: str) -> Iterator[tuple]:
    """`(op, launch, dtype, size, seed, …)` of all that an architecture is served, with and without dropout."""
    for seed in (None, torch.ones(1, dtype=torch.int64)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if arch == "sm_75" and dtype == torch.bfloat16:
                continue
            for hidden in (768, 1024, 4096):
                if dtype == torch.bfloat16 and hidden > 1024:
                    continue  # compiles to what float16 does, but for conversions
                yield "add_norm", launch_add_norm, dtype, hidden, seed
                if seed is None:
                    yield "add_norm, plain", launch_plain_norm, dtype, hidden, seed
            yield "bias_gelu", launch_bias_gelu, dtype, 3072, seed
            if seed is None and dtype != torch.float32:
                yield from quantise_launches(arch, dtype)
            if arch != "sm_75":
                yield from attention_launches(dtype, seed)


def quantise_launches(arch: str, dtype: torch.dtype) -> Iterator[tuple]:
    """For the products of `inference_gpu`, which NVIDIA's GPUs have from 8.0 on, in float8 from 8.9 on."""
    if is_amd(arch) or arch == "sm_75":
        return
    for features in (768, 1024, 3072, 4096):
        yield "quantise int8", launch_quantise, dtype, features, None
        if arch not in ("sm_80", "sm_86"):
            yield "quantise float8", launch_quantise, dtype, features, None, torch.float8_e4m3fn
    yield "dequantise", launch_dequantise, dtype, 768, None


def attention_launches(dtype: torch.dtype, seed: Tensor | None) -> Iterator[tuple]:
    for head_dim in (64,) if dtype == torch.bfloat16 else (32, 64, 128, 256):
        yield "attention", launch_attention, dtype, head_dim, seed
        yield "attention, many", launch_attention, dtype, head_dim, seed, 512, MANY
    if dtype == torch.float16:
        for op, max_seqlen in (("attention", 512), ("attention ≤ 64", 64)):
            case = (launch_attention, dtype, 64, seed, max_seqlen, 1)
            yield f"{op}, key bias", *case, torch.zeros(64)
            yield f"{op}, key ranges", *case, None, torch.zeros(64, 2, dtype=torch.int32)
    if dtype == torch.float32:
        for op, max_seqlen in (("attention", 512), ("attention ≤ 16", 16)):
            yield f"{op}, key bias", launch_attention, dtype, 128, seed, max_seqlen, 1, torch.zeros(64)
    of_one_block = ((16, 64),) if dtype == torch.float32 else ((64, 64), (32, 64), (128, 64), (64, 128))
    for max_seqlen, head_dim in of_one_block:
        yield f"attention ≤ {max_seqlen}", launch_attention, dtype, head_dim, seed, max_seqlen


def is_tabled(arch: str, op: str, _, dtype: torch.dtype, size: int, *rest) -> bool:
    """Those of the base and the large model, in the dtype in which both run on GPUs; Turing has no bfloat16."""
    return dtype == (torch.float16 if arch == "sm_75" else torch.bfloat16) and size in (64, 768, 1024, 3072)
