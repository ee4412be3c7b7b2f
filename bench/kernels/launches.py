"""What the Triton kernels are launched with on an architecture: each as the model does, on small tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from erniem_fast.kernels import attention, bias_gelu_dropout, layernorm

MANY = 300  # sequences, enough for the backward in one pass at any length


def launch_layernorm(dtype: torch.dtype, hidden: int, seed: Tensor | None, tokens: int = 64) -> None:
    x, vector, columns = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype), torch.zeros(tokens)
    layernorm.forward(x, x, vector, vector, vector, 1e-5, columns.long(), columns.long(), 0.1, seed, True)
    layernorm.backward(x, x, vector, 1e-5, columns.long(), columns.long(), 0.1, seed)


def launch_plain_layernorm(dtype: torch.dtype, hidden: int, seed: None, tokens: int = 64) -> None:
    """That of the embeddings, whose dropout is an op of its own."""
    x, vector = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    layernorm.forward(x, None, None, vector, vector, 1e-5, None, None, 0.0, seed, False)
    layernorm.backward(x, x, vector, 1e-5, None, None, 0.0, seed)


def launch_bias_gelu(dtype: torch.dtype, features: int, seed: Tensor | None, tokens: int = 64) -> None:
    x, columns = torch.zeros(tokens, features, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    bias_gelu_dropout.forward(x, x[0], "gelu", columns, columns, 0.1, seed)
    bias_gelu_dropout.backward(x, x, x[0], "gelu", columns, columns, 0.1, seed)


def launch_attention(
    dtype: torch.dtype, head_dim: int, seed: Tensor | None, max_seqlen: int = 512, sequences: int = 1
) -> None:
    heads = 768 // head_dim  # the base model's hidden size
    qkv, columns = torch.zeros(64, 3 * heads * head_dim, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    order, cu_seqlens = torch.zeros(sequences, dtype=torch.int64), torch.zeros(sequences + 1).int()
    case = (order, True, cu_seqlens, max_seqlen, columns, columns, None, heads, 0.1, 0.1, seed)
    out, statistics = attention.forward(qkv, *case)
    attention.backward(out, out, statistics, qkv, *case)


def launches(arch: str) -> Iterator[tuple]:
    """`(op, launch, dtype, size, seed, …)` of all that an architecture is served, with and without dropout."""
    for seed in (None, torch.ones(1, dtype=torch.int64)):
        for dtype in (torch.float16, torch.float32):
            for hidden in (768, 1024, 4096):
                yield "layernorm", launch_layernorm, dtype, hidden, seed
                if seed is None:
                    yield "layernorm, plain", launch_plain_layernorm, dtype, hidden, seed
            yield "bias_gelu_dropout", launch_bias_gelu, dtype, 3072, seed
            if arch != "sm_75":
                yield from attention_launches(dtype, seed)
        if arch != "sm_75":
            yield "layernorm", launch_layernorm, torch.bfloat16, 768, seed
            yield "bias_gelu_dropout", launch_bias_gelu, torch.bfloat16, 3072, seed
            yield "attention", launch_attention, torch.bfloat16, 64, seed


def attention_launches(dtype: torch.dtype, seed: Tensor | None) -> Iterator[tuple]:
    for head_dim in (32, 64, 128, 256):
        yield "attention", launch_attention, dtype, head_dim, seed
        yield "attention, many", launch_attention, dtype, head_dim, seed, 512, MANY
    of_one_block = ((64, 64), (128, 64), (64, 128)) if dtype == torch.float16 else ((16, 64),)
    for max_seqlen, head_dim in of_one_block:
        yield f"attention ≤ {max_seqlen}", launch_attention, dtype, head_dim, seed, max_seqlen


def is_tabled(arch: str, op: str, _, dtype: torch.dtype, size: int, seed: Tensor | None, max_seqlen=512, *rest) -> bool:
    plain, dropout = (attention.forward_config(arch, dtype, size, max_seqlen, drops) for drops in (False, True))
    return seed is not None or op == "layernorm, plain" or (op.startswith("attention") and plain != dropout)
