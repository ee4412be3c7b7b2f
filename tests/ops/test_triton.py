"""How the Triton kernels are offered: when they serve, what they say when they do not, and what torch.compile sees."""

import pytest
import torch

from erniem_fast import flags, ops
from erniem_fast.batch import TokenBatch
from erniem_fast.flags import use_kernels
from erniem_fast.kernels import attention
from erniem_fast.ops import Product
from erniem_fast.ops.choose import arguments_of
from erniem_fast.ops.triton import triton_implementation
from erniem_fast.reference import Norm
from tests.batches import dropout_of
from tests.kernels.comparison import DEVICE, SEED

CPU = torch.device("cpu")


@pytest.fixture
def batch():
    return TokenBatch.from_cu_seqlens(torch.tensor([0, 2, 7], device=DEVICE), 5, 7)


def add_norm_inputs(batch, dtype=torch.float32):
    """The residual, the product and the layer norm."""
    residual, x = (torch.randn(batch.tokens, 96, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    bias, *norm = (torch.randn(96, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))
    return residual, Product(x, bias), Norm(*norm, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_auto_does_not_take_the_interpreter(batch, monkeypatch):
    launched = []
    monkeypatch.setattr("erniem_fast.kernels.add_norm.forward", lambda **_: launched.append(1))
    ops.add_norm(*add_norm_inputs(batch))
    assert launched == []


def test_auto_takes_kernels_on_gpus():
    triton = triton_implementation("add_norm")
    assert triton.automatic(torch.device("cuda"))
    assert not triton.automatic(CPU)
    assert triton.fuses_bias


def test_the_processor_is_refused_without_the_interpreter(monkeypatch):
    triton = triton_implementation("add_norm")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.objection(CPU, torch.float32, 0) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "Triton has no kernels for cpu; move the model to a GPU" in triton.objection(CPU, torch.float32, 0)


@pytest.mark.parametrize(
    ("op", "dtype", "least"),
    [
        ("attention", torch.float16, "8.0"),
        ("attention", torch.float32, "8.0"),
        ("add_norm", torch.bfloat16, "8.0"),
        ("add_norm", torch.float16, None),
        ("bias_gelu", torch.float32, None),
    ],
)
@pytest.mark.skipif(torch.version.hip is not None, reason="not an NVIDIA GPU")
def test_what_a_turing_gpu_is_refused(op, dtype, least, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    reason = ops.IMPLEMENTATIONS[op]["triton"].refuses(torch.device("cuda"), dtype)
    assert reason == (least and f"for {dtype} the kernels need compute capability {least} or above; choose `torch`.")


def test_float64_is_refused(batch):
    with (
        use_kernels(layernorm="triton"),
        pytest.raises(RuntimeError, match="ERNIEM_FAST_LAYERNORM=triton cannot be served: the kernels take float16"),
    ):
        ops.add_norm(*add_norm_inputs(batch, torch.float64))


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "dropout"])
def test_custom_ops_are_well_behaved(batch, seed):
    dropout = dropout_of(batch, 0.1, seed) or [None] * 4
    residual, (x, bias, _), norm = add_norm_inputs(batch)
    qkv = torch.randn(batch.tokens, 96, device=DEVICE, requires_grad=True)
    erniem_fast = torch.ops.erniem_fast
    for op, inputs in (
        (erniem_fast.add_norm, (residual, x, bias, *norm, *dropout, True, "triton")),
        (erniem_fast.bias_gelu, (x, bias, "gelu", *dropout, True, "triton")),
        (erniem_fast.attention, (qkv, *batch.sequences, 2, 0.25, *dropout, True, "triton")),
    ):
        torch.library.opcheck(op.default, inputs)


def test_verify_passes(batch, monkeypatch):
    """The reference runs beside both directions of every kernel."""
    monkeypatch.setenv(flags.VERIFY.name, "1")
    qkv, dropout = torch.randn(batch.tokens, 3 * 32, device=DEVICE, requires_grad=True), batch.dropout(0.1, SEED)
    with use_kernels(attention="triton", layernorm="triton", bias_gelu="triton"):
        out = ops.attention(qkv, batch, 2, 0.25, dropout)
        out = ops.bias_gelu(Product(out, out[0].detach()), "gelu", dropout)
        row = out[0].detach()
        out = ops.add_norm(out, Product(out, row), Norm(row, row, 1e-5), dropout)
    out.square().sum().backward()
    assert qkv.grad.abs().max() > 0


def test_verify_catches_a_broken_kernel(batch, monkeypatch):
    forward = attention.forward

    def broken(**inputs):
        return tuple(1.001 * each for each in forward(**arguments_of(forward, inputs)))

    monkeypatch.setenv(flags.VERIFY.name, "1")
    monkeypatch.setattr(attention, "forward", broken)
    qkv = torch.randn(batch.tokens, 3 * 32, device=DEVICE)
    with use_kernels(attention="triton"), pytest.raises(RuntimeError, match=r"attention forward \(triton\) disagrees"):
        ops.attention(qkv, batch, 2, 0.25)
