"""What the Triton kernels are launched with on an architecture: each as the model does, on small tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from erniem_fast.batch import Sequences
from erniem_fast.dropout import Dropout
from erniem_fast.kernels import add_norm, attention, bias_gelu
from erniem_fast.reference import Norm

MANY = 300  # sequences, enough for the backward in one pass at any length


def dropout_of(seed: Tensor | None, tokens: int) -> Dropout | None:
    columns = torch.zeros(tokens, dtype=torch.int64)
    return None if seed is None else Dropout(0.1, seed, columns, columns)


def launch_add_norm(dtype: torch.dtype, hidden: int, seed: Tensor | None, tokens: int = 64) -> None:
    x, vector = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    norm, dropout = Norm(vector, vector, 1e-5), dropout_of(seed, tokens)
    add_norm.forward(x, x, vector, norm, dropout, save=True)
    add_norm.backward(x, x, norm, dropout)


def launch_plain_norm(dtype: torch.dtype, hidden: int, _: None, tokens: int = 64) -> None:
    """That of the embeddings, whose dropout is not the kernel's."""
    x, vector = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    norm = Norm(vector, vector, 1e-5)
    add_norm.forward(x, None, None, norm, None, save=False)
    add_norm.backward(x, x, norm, None)


def launch_bias_gelu(dtype: torch.dtype, features: int, seed: Tensor | None, tokens: int = 64) -> None:
    x, dropout = torch.zeros(tokens, features, dtype=dtype), dropout_of(seed, tokens)
    bias_gelu.forward(x, x[0], "gelu", dropout)
    bias_gelu.backward(x, x, x[0], "gelu", dropout)


def launch_attention(
    dtype: torch.dtype, head_dim: int, seed: Tensor | None, max_seqlen: int = 512, sequences: int = 1
) -> None:
    heads = 768 // head_dim  # the base model's hidden size
    qkv = torch.zeros(64, 3 * heads * head_dim, dtype=dtype)
    where = Sequences(
        cu_seqlens=torch.zeros(sequences + 1, dtype=torch.int32),
        max_seqlen=max_seqlen,
        longest_first=torch.zeros(sequences, dtype=torch.int64),
        contiguous=True,
        sequence_ids=torch.zeros(64, dtype=torch.int64),
        key_mask=None,
    )
    case = (where, heads, 0.1, dropout_of(seed, 64))
    out, statistics = attention.forward(qkv, *case)
    attention.backward(out, out, statistics, qkv, *case)


def launches(arch: str) -> Iterator[tuple]:
    """`(op, launch, dtype, size, seed, …)` of all that an architecture is served, with and without dropout."""
    for seed in (None, torch.ones(1, dtype=torch.int64)):
        for dtype in (torch.float16, torch.float32):
            for hidden in (768, 1024, 4096):
                yield "add_norm", launch_add_norm, dtype, hidden, seed
                if seed is None:
                    yield "add_norm, plain", launch_plain_norm, dtype, hidden, seed
            yield "bias_gelu", launch_bias_gelu, dtype, 3072, seed
            if arch != "sm_75":
                yield from attention_launches(dtype, seed)
        if arch != "sm_75":
            yield "add_norm", launch_add_norm, torch.bfloat16, 768, seed
            yield "bias_gelu", launch_bias_gelu, torch.bfloat16, 3072, seed
            yield "attention", launch_attention, torch.bfloat16, 64, seed


def attention_launches(dtype: torch.dtype, seed: Tensor | None) -> Iterator[tuple]:
    for head_dim in (32, 64, 128, 256):
        yield "attention", launch_attention, dtype, head_dim, seed
        yield "attention, many", launch_attention, dtype, head_dim, seed, 512, MANY
    of_one_block = ((64, 64), (128, 64), (64, 128)) if dtype == torch.float16 else ((16, 64),)
    for max_seqlen, head_dim in of_one_block:
        yield f"attention ≤ {max_seqlen}", launch_attention, dtype, head_dim, seed, max_seqlen


def is_tabled(arch: str, op: str, _, dtype: torch.dtype, size: int, seed: Tensor | None, max_seqlen=512, *rest) -> bool:
    if seed is not None or not op.startswith("attention"):
        return seed is not None or op == "add_norm, plain"
    plain, dropout = (
        (
            attention.forward_config(arch, dtype, size, max_seqlen, drops),
            attention.backward_config(arch, dtype, size, drops),
        )
        for drops in (False, True)
    )
    return plain != dropout
