"""A whole layer as one native call, for so few tokens that Python between the ops would take a quarter of the time."""

import torch
from torch import Tensor, nn

from .. import flags
from ..batch import TokenBatch
from .implementation import choose
from .native import FLOAT, INT, Function
from .native_encoder import ACTIVATIONS

_LAYER = Function(
    "layer",
    {
        "x": (FLOAT, "tokens", "hidden"),
        "q_weight": (FLOAT, "projected", "hidden"),
        "q_bias": (FLOAT, "projected"),
        "k_weight": (FLOAT, "projected", "hidden"),
        "k_bias": (FLOAT, "projected"),
        "v_weight": (FLOAT, "projected", "hidden"),
        "v_bias": (FLOAT, "projected"),
        "out_weight": (FLOAT, "hidden", "projected"),
        "out_bias": (FLOAT, "hidden"),
        "norm1_weight": (FLOAT, "hidden"),
        "norm1_bias": (FLOAT, "hidden"),
        "up_weight": (FLOAT, "intermediate", "hidden"),
        "up_bias": (FLOAT, "intermediate"),
        "down_weight": (FLOAT, "hidden", "intermediate"),
        "down_bias": (FLOAT, "hidden"),
        "norm2_weight": (FLOAT, "hidden"),
        "norm2_bias": (FLOAT, "hidden"),
        "longest_first": (INT, "sequences"),
        "cu_seqlens": (torch.int32, "bounds"),
        "columns": (INT, "tokens"),
        "sequences_of": (INT, "tokens"),
        "key_mask": (torch.bool, "tokens"),
        "scratch": (FLOAT, "tokens", "width"),
        "out": (FLOAT, "tokens", "hidden"),
    },
    written=("scratch", "out"),
    sizes="tokens hidden projected intermediate sequences bounds heads head_dim threads activation",
    factors="norm1_eps norm2_eps scale",
    optional=("key_mask",),
)


@flags.while_held
def serves() -> bool:
    """Whether every op inside a layer would run natively on the CPU in float32, without the reference beside it."""
    ops = ("attention", "bias_gelu", "layernorm")
    return flags.read(flags.VERIFY) == "0" and all(
        choose(op, torch.device("cpu"), torch.float32) == "native" for op in ops
    )


def layer(
    x: Tensor,
    batch: TokenBatch,
    linears: dict[str, nn.Linear],
    norms: dict[str, nn.LayerNorm],
    heads: int,
    scale: float,
    activation: str,
) -> Tensor:
    """What a layer's ops and products compute one after another, without dropout, head mask or probabilities.

    Args:
        x: float32 `(tokens, hidden)` on the CPU.
        batch: the tokens.
        linears: `q`, `k`, `v`, `out`, `up` and `down`.
        norms: `norm1` and `norm2`.
        heads, scale: of the attention.
        activation: a value of `ops.ACTIVATIONS`.

    Returns:
        `(tokens, hidden)`.
    """
    tokens, hidden = x.shape
    projected, intermediate = linears["q"].weight.shape[0], linears["up"].weight.shape[0]
    out = x.new_empty(tokens, hidden)
    _LAYER(
        x.device,
        x.dtype,
        x=x,
        **{f"{name}_weight": each.weight for name, each in (*linears.items(), *norms.items())},
        **{f"{name}_bias": each.bias for name, each in (*linears.items(), *norms.items())},
        **{f"{name}_eps": norm.eps for name, norm in norms.items()},
        longest_first=batch.longest_first,
        cu_seqlens=batch.cu_seqlens,
        columns=batch.columns,
        sequences_of=batch.sequences,
        key_mask=batch.key_mask,
        scratch=x.new_empty(tokens, width := 4 * projected + 2 * hidden + intermediate),
        out=out,
        tokens=tokens,
        hidden=hidden,
        width=width,
        projected=projected,
        intermediate=intermediate,
        sequences=len(batch.longest_first),
        bounds=len(batch.cu_seqlens),
        heads=heads,
        head_dim=projected // heads,
        threads=torch.get_num_threads(),
        activation=ACTIVATIONS[activation],
        scale=scale,
    )
    return out
