"""Linears and word tables with packed, bfloat16 and int8 weights: their numbers, one by one."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from erniem_fast import modes, reference
from erniem_fast.inference import (
    LINEARS,
    TABLES,
    BFloat16Embedding,
    BFloat16Linear,
    Int8Embedding,
    Int8Linear,
    OnednnBFloat16Linear,
    OnednnPackedLinear,
    PackedLinear,
)
from erniem_fast.native import packed as products
from erniem_fast.optimize import bfloat16_objection

# Whether a form can be asked for here, and whether oneDNN has its products.
SERVED = {"packed": True, "int8": True, "bfloat16": bfloat16_objection() is None}
ONEDNN = modes.has_onednn_packing()
OF_ONEDNN = (OnednnPackedLinear, OnednnBFloat16Linear)

every_linear = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                not SERVED[kind.weights] or (kind in OF_ONEDNN and not ONEDNN),
                reason=f"this machine has no {kind.weights} products",
            ),
        )
        for kind in (*LINEARS.values(), *OF_ONEDNN)
    ],
)
LEVELS = products.levels() if products.objection() is None else 255
# How wide a level is, in those of 8 bits: twice as wide where inputs have 7, because AVX2's products could overflow.
# What rounding inputs costs grows with it, and a cosine's distance from 1 with its square.
WIDTH = 255 / LEVELS
SIZES = [(96, 24), (1031, 7), (3, 5), (768, 40)]  # in_features, out_features


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(inputs, outputs, bias=True):
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).eval()
    with torch.no_grad():
        linear.weight[0] = 0.0
        linear.weight[-1] *= 100.0
    return linear


@pytest.mark.parametrize("tokens", [0, 1, 3, 5, 64])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_equals_the_reference_bit_for_bit(inputs, outputs, tokens, bias, monkeypatch):
    linear, x = make(inputs, outputs, bias), torch.randn(tokens, inputs) * torch.logspace(-6, 6, tokens)[:, None]
    weight, scale = reference.quantise_weight(linear.weight)
    rounded = Int8Linear.of(linear)
    assert torch.equal(rounded.weight, weight)
    assert torch.equal(rounded.weight_scale, scale)
    expected = reference.quantised_linear(x, weight, scale, linear.bias, LEVELS)
    assert torch.equal(rounded(x), expected)
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    assert torch.equal(rounded(x), expected)


def test_int8_of_a_token_does_not_depend_on_other_tokens():
    rounded, x = Int8Linear.of(make(768, 40)), torch.randn(9, 768)
    x[3], x[5], x[6] = torch.nan, torch.inf, 0.0
    result = rounded(x)
    assert result[[3, 5]].isnan().all()
    assert torch.equal(result[6], rounded.bias)
    assert result[[0, 1, 2, 4, 7, 8]].isfinite().all()
    for token in range(9):
        torch.testing.assert_close(rounded(x[token : token + 1])[0], result[token], rtol=0, atol=0, equal_nan=True)


def test_int8_takes_any_number_of_dimensions_and_dtype():
    rounded, x = Int8Linear.of(make(96, 24)), torch.randn(2, 3, 96).bfloat16()
    assert torch.equal(rounded(x), rounded(x.float().flatten(0, 1)).view(2, 3, 24))
    assert torch.equal(rounded(x[0, 0]), rounded(x)[0, 0])


@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("kind", [PackedLinear, OnednnPackedLinear])
def test_packed_beside_float64(inputs, outputs, tokens, kind, monkeypatch):
    if kind is OnednnPackedLinear and not ONEDNN:
        pytest.skip("there is no oneDNN here")
    linear, x = make(inputs, outputs), torch.randn(tokens, inputs)
    packed = kind.of(linear)
    assert torch.equal(packed.weight, linear.weight)
    exact = copy.deepcopy(linear).double()(x.double())
    # Each of a sum's additions rounds by half a unit of at most the sum of magnitudes.
    bound = inputs * torch.finfo(torch.float32).eps / 2 * (x.abs().double() @ linear.weight.abs().double().t() + 1.0)
    assert ((packed(x) - exact).abs() <= bound).all()
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    assert ((packed(x) - exact).abs() <= bound).all()


@pytest.mark.skipif(not SERVED["bfloat16"], reason="the CPU has no products in bfloat16")
@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("kind", [BFloat16Linear, OnednnBFloat16Linear])
def test_bfloat16_beside_float64(inputs, outputs, tokens, kind, monkeypatch):
    """Weights and inputs are rounded, each once, and results by oneDNN: the sums themselves are float32's."""
    if kind is OnednnBFloat16Linear and not ONEDNN:
        pytest.skip("there is no oneDNN here")
    linear, x = make(inputs, outputs), torch.randn(tokens, inputs)
    rounded = kind.of(linear)
    assert torch.equal(rounded.weight, linear.weight.bfloat16())
    x64, weight = x.bfloat16().double(), rounded.weight.double()
    exact = x64 @ weight.t() + linear.bias.double()
    sums = inputs * torch.finfo(torch.float32).eps * (x64.abs() @ weight.abs().t() + 1.0)
    result = rounded(x)
    assert result.dtype == x.dtype
    if kind is OnednnBFloat16Linear:
        assert torch.equal(rounded(x.bfloat16()), result.bfloat16())
        assert torch.equal(result.bfloat16().float(), result)
        sums += torch.finfo(torch.bfloat16).eps / 2 * (exact.abs() + sums)
    else:
        assert torch.equal(rounded(x.bfloat16()), result)
    assert ((result.double() - exact).abs() <= sums).all()
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    assert ((rounded(x).double() - exact).abs() <= sums).all()


@pytest.mark.parametrize("rows", [1, 5000])  # more than are rounded at once
def test_tables(rows):
    table = nn.Embedding(rows, 24, padding_idx=0).requires_grad_(False).eval()
    ids = torch.randint(rows, (2, 7))
    assert torch.equal(BFloat16Embedding.of(table)(ids), table(ids).bfloat16().float())
    weight, scale = reference.quantise_weight(table.weight)
    rounded = Int8Embedding.of(table)
    assert torch.equal(rounded.weight, weight)
    assert torch.equal(rounded(ids), weight[ids].float() * scale[ids].unsqueeze(-1))
    assert ((rounded(ids) - table(ids)).abs() <= 0.5001 * scale[ids].unsqueeze(-1)).all()


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    other = type(module).of(make(96, 24))
    yield other if other.load_state_dict(module.state_dict()) else None


@every_linear
def test_copies_hold_the_same_bits(kind):
    module, x = kind.of(make(96, 24)), torch.randn(5, 96)
    for each in copies(module):
        assert each is not module
        assert torch.equal(each(x), module(x))
        assert torch.equal(each.weight, module.weight)


@every_linear
def test_a_state_that_does_not_fit_is_refused(kind):
    module = kind.of(make(96, 24))
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r"weight"):
        module.load_state_dict({**state, "weight": state["weight"][:-1]})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        module.load_state_dict({"bias": state["bias"]})
    assert "weight" in module.load_state_dict({"bias": state["bias"]}, strict=False).missing_keys


@every_linear
def test_no_gradient_flows(kind):
    module = kind.of(make(96, 24))
    for training, needed in ((False, True), (True, False), (True, True)):
        x = torch.randn(5, 96, requires_grad=needed)
        with pytest.raises(RuntimeError, match=rf"{kind.__name__} cannot be trained.*restore"):
            module.train(training)(x)
        with torch.no_grad():
            module(x)
    assert not module.eval()(torch.randn(5, 96)).requires_grad


@pytest.mark.parametrize("kind", [*LINEARS.values(), *TABLES.values()])
def test_it_stays_in_float32_on_the_cpu(kind):
    form = kind.weights
    if not SERVED[form]:
        pytest.skip(f"this machine has no {form} products")
    module = kind.of(make(96, 24) if kind in LINEARS.values() else nn.Embedding(50, 24)).eval()
    x = torch.randn(5, 96) if kind in LINEARS.values() else torch.randint(50, (5,))
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(module.float().to("cpu")(x), expected)
    for change in (lambda: module.half(), lambda: module.to(torch.bfloat16), lambda: module.to("meta")):
        with pytest.raises(RuntimeError, match=rf"{form} weights stays in float32 on the CPU.*restore"):
            change()


def _answer(linears, x, results):
    with torch.inference_mode():
        results.put([linear(x).numpy() for linear in linears])


def test_a_spawned_process_gets_them():
    kinds = [*LINEARS.values(), *(kind for kind in OF_ONEDNN if ONEDNN)]
    linear, x = make(96, 24), torch.randn(5, 96)
    linears = nn.ModuleList([kind.of(linear) for kind in kinds if SERVED[kind.weights]])
    processes = multiprocessing.get_context("spawn")
    results = processes.SimpleQueue()
    process = processes.Process(target=_answer, args=(linears, x, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    with torch.inference_mode():
        for each, result in zip(linears, results.get(), strict=True):
            assert torch.equal(torch.from_numpy(result), each(x))
