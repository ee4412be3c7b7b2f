"""bfloat16 and float8 in Triton's interpreter, as `mended_floats` computes with them and as it does by itself."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from erniem_fast.ops.triton_interpreter import mended_floats

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")

SIZE = tl.constexpr(16)


@triton.jit
def _product_kernel(left_ptr, right_ptr, out_ptr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.trans(tl.load(left_ptr + at)), tl.load(right_ptr + at)))


@triton.jit
def _elementwise_kernel(left_ptr, right_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    left = tl.load(left_ptr + at)
    right = tl.load(right_ptr + at)
    if OPERATION == "add":
        left += right
    elif OPERATION == "sub":
        left -= right
    elif OPERATION == "mul":
        left *= right
    elif OPERATION == "neg":
        left = -left
    elif OPERATION == "maximum":
        left = tl.maximum(left, right)
    elif OPERATION == "minimum":
        left = tl.where(left < right, left, right)
    tl.store(out_ptr + at, left)


def transposed_product(left, right):
    """leftᵀ · right in float32, of two matrices `(16, 16)` in bfloat16."""
    out = torch.empty(16, 16)
    _product_kernel[(1,)](left.bfloat16(), right.bfloat16(), out)
    return out


def elementwise(operation, left, right):
    """In bfloat16, of two tensors in bfloat16."""
    out = torch.empty_like(left)
    _elementwise_kernel[(1,)](left, right, out, operation, left.numel())
    return out


def stored_as(dtype, x):
    """x, which the store converts."""
    out = torch.empty_like(x, dtype=dtype)
    _elementwise_kernel[(1,)](x, x, out, "none", x.numel())
    return out


def test_a_known_product():
    """Of integers that bfloat16 holds, whose sums of products float32 holds: exact in any order."""
    left, right = torch.randint(-99, 100, (2, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    with mended_floats():
        assert torch.equal(transposed_product(left, right), left.t() @ right)


def test_conversions_round_to_nearest_even():
    """As PyTorch's do: of random bits, so of any exponent, infinities and NaN too; of ties, and beside them."""
    generator = torch.Generator().manual_seed(0)
    at_random = torch.randint(-(2**31), 2**31, (1024,), generator=generator).int()
    upper = torch.randint(-(2**15), 2**15, (256,), generator=generator).int() << 16
    near_ties = torch.cat([upper, upper + 0x7FFF, upper + 0x8000, upper + 0x8001])
    x = torch.cat([at_random, near_ties]).view(torch.float32)
    with mended_floats():
        narrow = stored_as(torch.bfloat16, x)
        wide = stored_as(torch.float32, x.bfloat16())
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "neg", "maximum", "minimum"])
def test_elementwise_operations(operation):
    left, right = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    operands = (left,) if operation == "neg" else (left, right)
    with mended_floats():
        assert torch.equal(elementwise(operation, left, right), getattr(torch, operation)(*operands))


def float8_numbers():
    """All that float8_e4m3fn holds, and numbers between and beside them; 1024 together, as the kernel's blocks are."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between * (1 + 2.0**-20), between * (1 - 2.0**-20)])
    return F.pad(x, (0, 1024 - len(x)))


def test_conversions_to_float8_round_to_nearest_even():
    x = float8_numbers()
    with mended_floats():
        assert torch.equal(stored_as(torch.float8_e4m3fn, x).float(), x.to(torch.float8_e4m3fn).float())
        beyond = stored_as(torch.float8_e4m3fn, torch.tensor([464.1, -1e9, torch.inf, torch.nan]))
    assert beyond[:3].tolist() == [448.0, -448.0, 448.0]
    assert beyond[3].isnan()


# By itself, the interpreter takes the bits of bfloat16 for integers. A test that fails here says that Triton has mended
# that, and that part of `mended_floats` can go.


def test_by_itself_the_interpreter_multiplies_bits():
    identity = torch.eye(16)
    assert torch.equal(transposed_product(3 * identity, 5 * identity), 0x4040 * 0x40A0 * identity)


def test_by_itself_the_interpreter_adds_bits():
    half = torch.full((16,), 0.5).bfloat16()  # 0x3F00
    assert elementwise("add", half, half).view(torch.int16).tolist() == [2 * 0x3F00] * 16


def test_by_itself_the_interpreter_cuts_digits_off():
    x = torch.full((16,), 1 + 0.75 * 2**-7)
    assert stored_as(torch.bfloat16, x).tolist() == [1.0] * 16
    assert x.bfloat16().tolist() == [1 + 2**-7] * 16


def test_by_itself_the_interpreter_loses_carries_and_subnormal_digits_of_float8():
    """1.9375 is half way to 2, whose mantissa is 0; 2.75 · 2^-9 is near 3 times the smallest number."""
    x = torch.tensor([1.9375, 2.75 * 2**-9])
    assert x.to(torch.float8_e4m3fn).tolist() == [2.0, 3 * 2**-9]
    assert stored_as(torch.float8_e4m3fn, x).tolist() != [2.0, 3 * 2**-9]
