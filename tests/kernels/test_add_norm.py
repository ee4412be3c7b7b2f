"""The Triton kernels of add_norm against the reference."""

from functools import partial

import pytest
import torch

from erniem_fast import ops, reference
from erniem_fast.dropout import dropout_mask
from erniem_fast.flags import use_kernels
from erniem_fast.kernels import add_norm
from erniem_fast.kernels.device import Device
from erniem_fast.ops import Product
from erniem_fast.ops.triton import on_device
from erniem_fast.reference import Norm
from tests.batches import dropout_of, two_sequences
from tests.kernels.comparison import DEVICE, SEED, assert_equivalent, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-5


def inputs_of(tokens, hidden, residual_dtype, dtype):
    shapes = ((tokens, hidden), (tokens, hidden), (hidden,), (hidden,), (hidden,))
    dtypes = (residual_dtype, dtype, dtype, residual_dtype, residual_dtype)
    residual, x, bias, weight, norm_bias = (
        torch.randn(shape, device=DEVICE).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return residual + 3, x, bias, weight, norm_bias


def kernel(batch, p, seed, residual, x, bias, weight, norm_bias):
    with use_kernels(layernorm="triton"):
        return ops.add_norm(residual, Product(x, bias), Norm(weight, norm_bias, EPS), dropout_of(batch, p, seed))


def oracle(batch, p, seed, residual, x, bias, weight, norm_bias):
    return reference.add_norm(residual, x, bias, Norm(weight, norm_bias, EPS), dropout_of(batch, p, seed))


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    ("residual_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize(
    ("tokens", "hidden"), [(1, 768), (3, 1000), (33, 384), (19, 768), (9, 1024), (150, 96), (2, 4096), (5, 7)]
)
def test_equivalent_to_the_reference(tokens, hidden, residual_dtype, dtype, seed):
    torch.manual_seed(tokens + hidden)
    batch = two_sequences(tokens, DEVICE)
    inputs = inputs_of(tokens, hidden, residual_dtype, dtype)
    assert_equivalent(partial(kernel, batch, 0.1, seed), partial(oracle, batch, 0.1, seed), inputs)


def test_no_tokens():
    results = run(partial(kernel, two_sequences(0, DEVICE), 0.1, SEED), inputs_of(0, 768, torch.float32, torch.float32))
    assert results[0].shape == (0, 768)
    assert all(torch.equal(each, torch.zeros_like(each)) for each in results)


def test_without_a_bias():
    batch = two_sequences(6, DEVICE)
    residual, x, _, weight, norm_bias = inputs_of(6, 384, torch.float32, torch.float32)

    def unbiased(op):
        return lambda *inputs: op(batch, 0.1, SEED, *inputs[:2], None, *inputs[2:])

    assert_equivalent(unbiased(kernel), unbiased(oracle), (residual, x, weight, norm_bias))


def test_inputs_that_are_not_contiguous():
    batch = two_sequences(6, DEVICE)
    residual, x, *vectors = inputs_of(6, 384, torch.float32, torch.float32)
    transposed = [each.t().contiguous().t() for each in (residual, x)]
    strided = run(partial(kernel, batch, 0.1, SEED), [*transposed, *vectors])
    dense = run(partial(kernel, batch, 0.1, SEED), [residual, x, *vectors])
    assert all(torch.equal(left, right) for left, right in zip(strided, dense, strict=True))


@pytest.mark.parametrize("hidden", [20, 100, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_draws_the_bits_of_the_reference(hidden, dtype):
    batch = two_sequences(9, DEVICE)
    _, x, bias, weight, norm_bias = inputs_of(9, hidden, dtype, dtype)
    residual = torch.zeros_like(x)
    *_, grad_x, _, _, _ = run(partial(kernel, batch, 0.3, SEED), [residual, x.abs() + 1, bias.abs(), weight, norm_bias])
    mask = dropout_mask(SEED, 0.3, hidden, batch.columns, batch.sequences.sequence_ids)
    assert 0.6 < mask.float().mean() < 0.8
    assert torch.equal(grad_x != 0, mask)


def test_everything_dropped():
    inputs = inputs_of(4, 96, torch.float32, torch.float32)
    assert_equivalent(
        partial(kernel, two_sequences(4, DEVICE), 1.0, SEED),
        partial(oracle, two_sequences(4, DEVICE), 1.0, SEED),
        inputs,
    )


def test_statistics_survive_a_large_mean():
    """A variance taken as E[x²] - E[x]² would have lost all its digits here."""
    residual, *rest = inputs_of(3, 768, torch.float32, torch.float32)
    inputs = (residual + 4096, *rest)
    assert_equivalent(
        partial(kernel, two_sequences(3, DEVICE), 0.0, None),
        partial(oracle, two_sequences(3, DEVICE), 0.0, None),
        inputs,
    )


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hidden", [96, 384, 768, 1024, 1536, 3072, 4096])
@pytest.mark.parametrize("device", [Device("sm_90", 132, 32), Device("gfx942", 304, 64), Device("gfx1100", 96, 32)])
def test_no_lane_idles(hidden, itemsize, device):
    for config in (
        add_norm.forward_config(device, hidden, itemsize),
        add_norm.backward_config(device, hidden, itemsize),
    ):
        assert config.block * config.chunks == hidden
        assert config.block * config.rows * itemsize == 16 * device.lanes * config.warps


@pytest.mark.parametrize(
    ("arch", "hidden", "expected"),
    [("sm_80", 768, 255), ("sm_80", 1024, 168), ("sm_80", 4096, 255), ("gfx942", 1024, None)],
)
def test_registers_are_limited_so_that_all_programs_fit(arch, hidden, expected):
    """A multiprocessor has 65,536 registers, given in eights, and a lane takes 255 of them at most."""
    device = Device(arch, 108, 32 if expected else 64)
    limit = add_norm._register_limit(device, add_norm.backward_config(device, hidden, itemsize=2))
    assert limit == ({} if expected is None else {"maxnreg": expected})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1100])
def test_sums_over_many_rows(rows, dtype):
    """The interpreter's device has few programs, whose sums are one step of the kernel."""
    partials = torch.randint(-9, 10, (3, rows, 100), device=DEVICE).float()
    with on_device(partials.device):
        sums = torch.stack(add_norm._sums(partials, dtype))
    assert sums.dtype == dtype
    assert torch.equal(sums, partials.sum(1).to(dtype))


def test_backward_is_deterministic():
    inputs = inputs_of(150, 96, torch.float32, torch.float32)
    first, second = (run(partial(kernel, two_sequences(150, DEVICE), 0.1, SEED), inputs) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
