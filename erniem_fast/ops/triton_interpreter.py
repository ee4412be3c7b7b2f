"""Makes Triton's interpreter compute with bfloat16 and float8 as GPUs do, inside `mended_floats`.

The interpreter (seen in Triton 3.9) stores a bfloat16 as the uint16 of its bits. It multiplies and adds those integers,
and its conversion from float32 cuts digits off where GPUs round to nearest even. Of float8_e4m3fn, its conversion
rounds half of the ties away from even, and loses the carry into the exponent and digits of subnormal numbers.
`tests/ops/test_triton_interpreter.py` shows the faults, and fails once Triton has fixed them; this module can then be
deleted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def mended_floats() -> Iterator[None]:
    """Within the block, interpreted kernels compute with bfloat16, and round to float8, as GPUs do.

    Sums of bfloat16 over an axis (`tl.sum`) stay wrong; the kernels take all such sums in float32.
    """
    from triton.runtime.interpreter import interpreter_builder

    before = type(interpreter_builder)
    interpreter_builder.__class__ = _builder()
    try:
        yield
    finally:
        interpreter_builder.__class__ = before


@cache
def _builder() -> type:
    """Triton's class that computes each operation, but with bfloat16 operands widened to float32."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bfloat16(x: TensorHandle) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def widened(x: TensorHandle) -> TensorHandle:
        if not is_bfloat16(x):
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(x: TensorHandle) -> TensorHandle:
        """Rounds float32 to the nearest bfloat16, and ties to the even one."""
        bits = x.data.view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(x.data), 0x7FC0, bits).astype(np.uint16), tl.bfloat16)

    def rounded_to_float8(x: TensorHandle) -> TensorHandle:
        """Rounds float32 as `rounded` does; numbers beyond the largest become it, as on GPUs."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        values = torch.from_numpy(np.ascontiguousarray(x.data)).clamp(-largest, largest).to(torch.float8_e4m3fn)
        return TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)

    class Builder(InterpreterBuilder):
        def create_dot(self, a, b, *rest):
            return super().create_dot(widened(a), widened(b), *rest)

        def cast_impl(self, src, dst_type):
            if dst_type.scalar == tl.bfloat16:
                return rounded(super().cast_impl(src, tl.float32))
            return super().cast_impl(widened(src), dst_type)

        def create_fp_to_fp(self, src, dst_type, rounding_mode):
            if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.float8e4nv):
                return rounded_to_float8(src)
            return super().create_fp_to_fp(src, dst_type, rounding_mode)

        def unary_op(self, arg, op):
            result = super().unary_op(widened(arg), op)
            return rounded(result) if is_bfloat16(arg) else result

        def binary_op(self, lhs, rhs, op):
            result = super().binary_op(widened(lhs), widened(rhs), op)
            return rounded(result) if is_bfloat16(lhs) and result.data.dtype == np.float32 else result

    return Builder
