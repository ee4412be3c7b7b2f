"""Modules for inference on an NVIDIA GPU: linears that multiply 8-bit numbers, float8 or int8.

Rows of the weight and rows of the input are each scaled by a factor of their own, so that a token's numbers do not
depend on other tokens. The input is rounded while the model runs.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import modes, ops, reference
from .inference import InferenceModule, is_plain_inference, round_rows

# Rows of an input that `modes.multiply_bytes` takes on a GPU, at least.
_LEAST_ROWS = 32

# Of a model; what is not rounded stays in it.
DTYPES = (torch.bfloat16, torch.float16)


class ScaledLinear(InferenceModule):
    """A linear with an 8-bit weight: `(..., in_features)`, floating point, to `(..., out_features)` in the same dtype.

    A row of the input with NaN or infinity gives a row of NaN. Zeros give the bias.

    Attributes:
        dtype: of the weight.
        multiple: what the numbers of features must be multiples of.
        capability: the lowest compute capability of GPUs that multiply such numbers.
        weight: `(out_features, in_features)`.
        weight_scale: factors of the weight's rows, float32 `(out_features,)`.
        bias: `(out_features,)` in `out_dtype`, or None.
        out_dtype: bfloat16 or float16.
    """

    multiple: ClassVar[int]
    capability: ClassVar[tuple[int, int]]

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: nn.Parameter | None, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_parameter("bias", bias)
        self.out_dtype = out_dtype

    @classmethod
    def of(cls, linear: nn.Linear) -> "ScaledLinear":
        """The linear with its weight rounded, on the device of the weight."""
        weight = linear.weight.detach()
        return cls(*cls.round(weight), linear.bias, weight.dtype).train(linear.training)

    @classmethod
    def fits(cls, linear: nn.Linear) -> bool:
        """Whether there are products for the numbers of features."""
        return all(features % cls.multiple == 0 for features in linear.weight.shape)

    @staticmethod
    def round(weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and its scales, as the attributes are."""
        raise NotImplementedError

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("weight", "weight_scale"), self.round(weight.to(self.out_dtype)), strict=True))

    @classmethod
    def multiply(cls, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        """`(tokens, in_features)` to `(tokens, out_features)` in the dtype of x, which is the bias's."""
        raise NotImplementedError

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight, self.weight_scale, self.bias

    def compute(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.weight.shape[1]).to(self.out_dtype)
        return self.multiply(rows, *self.operands()).to(x.dtype).view(*x.shape[:-1], self.weight.shape[0])

    def unrounded(self) -> tuple[torch.dtype, torch.device]:
        return self.out_dtype, self.weight.device

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, bias={self.bias is not None}"


class Float8Linear(ScaledLinear):
    """A linear with a float8_e4m3fn weight. Attributes as `ScaledLinear`'s."""

    weights = "float8"
    dtype = torch.float8_e4m3fn
    multiple = 16
    capability = (8, 9)

    @staticmethod
    def round(weight: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = reference.quantise(weight, torch.float8_e4m3fn)
        return values, scale.squeeze(-1)

    @classmethod
    def multiply(cls, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        values, scale = ops.quantise(x, cls.dtype)
        return modes.multiply_float8(values, scale, weight.t(), weight_scale[None], bias, x.dtype)

    def __getstate__(self) -> dict[str, object]:
        """With the weight's bytes: torch pickles tensors of float8, but cannot read them again."""
        return {**self.__dict__, "_buffers": {**self._buffers, "weight": self.weight.view(torch.int8)}}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.weight = self.weight.view(self.dtype)


class Int8GpuLinear(ScaledLinear):
    """A linear with the int8 weight that `Int8Linear` has on a CPU. Attributes as `ScaledLinear`'s.

    Sums are exact, so that a token's result has the same bits alone and in any batch.
    """

    weights = "int8"
    dtype = torch.int8
    multiple = 8
    capability = (8, 0)

    round = staticmethod(round_rows)

    @classmethod
    def multiply(cls, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        values, scale = ops.quantise(x, cls.dtype)
        if len(values) < _LEAST_ROWS:
            values = F.pad(values, (0, 0, 0, _LEAST_ROWS - len(values)))
        sums = modes.multiply_bytes(values, weight.t())
        return ops.dequantise(sums, scale, weight_scale, bias, x.dtype)


GPU_LINEARS = {kind.weights: kind for kind in (Float8Linear, Int8GpuLinear)}


def project_as_one(linears: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """The results of linears side by side, by one product of x, which is rounded once; None if each has to be called.

    Args:
        linears: any modules.
        x: `(tokens, in_features)`, floating point.
    """
    kind = type(linears[0])
    if modes.is_recorded() or not issubclass(kind, ScaledLinear):
        return None
    plain = all(is_plain_inference(linear, kind) and linear.bias is not None for linear in linears)
    if not plain or len({linear.out_dtype for linear in linears}) > 1:
        return None
    for linear in linears:
        linear.check_inference(x)
    joined = (_join(parts) for parts in zip(*(linear.operands() for linear in linears), strict=True))
    return kind.multiply(x.to(linears[0].out_dtype), *joined).to(x.dtype)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, of the numbers' bytes where they are float8."""
    if parts[0].dtype != torch.float8_e4m3fn:
        return torch.cat(parts)
    return torch.cat([part.view(torch.int8) for part in parts]).view(torch.float8_e4m3fn)


def gpu_objection(weights: str, device: torch.device) -> str | None:
    """Why a device does not serve a key of `GPU_LINEARS`, with the remedy; None if it does."""
    major, minor = GPU_LINEARS[weights].capability
    wanted = f"needs an NVIDIA GPU of compute capability {major}.{minor} or later"
    if device.type != "cuda":
        return f"{wanted}, but the model is on {device}; use weights='int8', or move the model to such a GPU."
    if torch.version.hip is not None:
        return f"{wanted}, but {device} is AMD's; leave the weights as they are, in bfloat16."
    capability = torch.cuda.get_device_capability(device)
    if capability < (major, minor):
        served = [f"weights={name!r}" for name, kind in GPU_LINEARS.items() if capability >= kind.capability]
        remedy = " or ".join([*served, "bfloat16 weights as they are"])
        return f"{wanted}, but {device} has {capability[0]}.{capability[1]}; use {remedy}."
    return None
