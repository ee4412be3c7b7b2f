"""The matrix product x Wᵀ + b, on the CPU in float32."""

from torch import Tensor

from .function import FLOAT, Function

_FORWARD = Function(
    "linear_forward",
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


def forward(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Writes `F.linear(x, weight, bias)` into `out`.

    Args:
        out: float32 `(tokens, out_features)` on the CPU; its rows need not be adjacent in memory.
        x: float32 `(tokens, in_features)`.
        weight, bias: float32 `(out_features, in_features)`, and `(out_features,)` or None.

    Raises:
        ValueError, BuildError, RuntimeError: see `Function.__call__`.
    """
    _FORWARD(x.device, x.dtype, x=x, weight=weight, bias=bias, out=out, out_stride=out.stride(0))
