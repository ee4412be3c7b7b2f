"""Linears of 8-bit numbers for GPUs, on the CPU: rounding, bounds, whole models, and what `optimize` refuses.

The CPU's product of float8 takes no scales by rows before torch 2.13, so the reference's stands in for it.
"""

import copy
import io
import logging
import math
import pickle
from importlib import import_module

import pytest
import torch
from torch import nn

import erniem_fast
from erniem_fast import ErnieMModel, inference_gpu, modes, ops, reference, status
from erniem_fast.inference_gpu import GPU_LINEARS, Float8Linear, Int8GpuLinear, gpu_objection, project_as_one
from tests.model.tiny import IDS, MASK, REAL, load

optimize = import_module("erniem_fast.optimize")  # the package has a function of this name
FLOAT8 = torch.float8_e4m3fn
every_kind = pytest.mark.parametrize("kind", GPU_LINEARS.values(), ids=GPU_LINEARS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# The least cosine of a token's hidden state to the one in 16 bits, of the tiny model: seen 0.9887 and 0.9994.
COSINES = {"float8": 0.98, "int8": 0.999}


def float8_by_reference(x, scale, weight, weight_scale, bias, dtype):
    return reference.dequantise(x.double() @ weight.double(), scale.double(), weight_scale, bias, dtype)


def bytes_as_on_a_gpu(x, weight):
    """The product, with what a GPU demands."""
    assert len(x) > 16
    assert not (weight.shape[0] % 8)
    assert not (weight.shape[1] % 8)
    return torch._int_mm(x, weight)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """As if the CPU were such a GPU."""
    monkeypatch.setattr(modes, "multiply_float8", float8_by_reference)
    monkeypatch.setattr(modes, "multiply_bytes", bytes_as_on_a_gpu)
    monkeypatch.setattr(optimize, "gpu_objection", lambda *_: None)
    monkeypatch.setattr(optimize, "_kinds", lambda weights, _: {nn.Linear: GPU_LINEARS[weights]})


def make_linear(inputs, outputs, dtype, bias=True):
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).eval()
    linear.weight[0] = 0.0
    linear.weight[-1] *= 100.0
    return linear.to(dtype)


def make(weights, dtype=torch.bfloat16, model_class=ErnieMModel, keep=False):
    return erniem_fast.optimize(load(model_class).to(dtype), weights, keep=keep)


@torch.inference_mode()
def hidden(model, ids=IDS, mask=MASK):
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


# --- Rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *inference_gpu.DTYPES])
def test_errors_of_float8(dtype):
    """A number rounds by at most half of a place in its 3 digits, and small ones by half of the smallest number."""
    x = (torch.randn(64, 768) * torch.logspace(-6, 3, 64)[:, None]).to(dtype)
    values, scale = ops.quantise(x, FLOAT8)
    assert torch.equal(values.float().abs().amax(1), torch.full((64,), 448.0))
    exact = x.double()
    bound = torch.maximum(exact.abs() * 2.0**-4, scale.double() * 2.0**-10)
    # Three roundings in float32 come before the one to float8.
    assert ((values.double() * scale - exact).abs() <= bound + exact.abs() * 3 * 2.0**-24).all()


@pytest.mark.parametrize("dtype", [torch.float32, *inference_gpu.DTYPES])
def test_errors_of_int8(dtype):
    x = (torch.randn(64, 768) * torch.logspace(-6, 3, 64)[:, None]).to(dtype)
    values, scale = ops.quantise(x, torch.int8)
    assert torch.equal(values.int().abs().amax(1), torch.full((64,), 127, dtype=torch.int32))
    exact = x.double()
    assert ((values.double() * scale - exact).abs() <= scale / 2 + exact.abs() * 3 * 2.0**-24).all()


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_rounding_is_monotone_and_by_rows(dtype):
    x = torch.randn(9, 512).sort(dim=1).values
    values, scale = ops.quantise(x, dtype)
    assert (values.float().diff(dim=1) >= 0).all()
    assert len(values.float().unique()) > 100
    for row in range(9):
        alone, its_scale = ops.quantise(x[row : row + 1], dtype)
        assert torch.equal(alone.float()[0], values.float()[row])
        assert torch.equal(its_scale[0], scale[row])


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8])
def test_rows_of_zeros_of_no_finite_number_and_of_extremes(dtype):
    largest = torch.finfo(torch.float32).max
    x = torch.ones(8, 16)
    x[0], x[1, 3], x[2, 15], x[3], x[4, 5] = 0.0, torch.nan, -torch.inf, largest, largest
    x[5], x[6] = 1e-42, -0.0
    values, scale = ops.quantise(x, dtype)
    assert scale.squeeze().isnan().tolist() == [False, True, True, *[False] * 5]
    assert scale[[0, 5, 6]].tolist() == [[0.0]] * 3  # subnormal scales have no reciprocals
    assert values.float()[[0, 1, 2, 5, 6]].abs().max() == 0
    assert values.float()[3].tolist() == [reference.largest_of(dtype)] * 16
    assert values.float()[4].nonzero().tolist() == [[5]]
    assert (values.float().abs() <= reference.largest_of(dtype)).all()


def test_int8_rounds_ties_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, 126.5]])
    values, scale = ops.quantise(x, torch.int8)
    assert scale.item() == 1.0
    assert values.tolist() == [[127, 0, 2, 0, -2, 126]]


# --- Linears ----------------------------------------------------------------------------------------------------------


@every_kind
@every_dtype
@pytest.mark.parametrize("tokens", [0, 1, 17, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_beside_float64(kind, dtype, tokens, bias):
    """Of exact products of what is rounded, only the result is rounded, after sums in float32."""
    linear, x = make_linear(768, 48, dtype, bias), torch.randn(tokens, 768).to(dtype)
    scaled = kind.of(linear)
    result = scaled(x)
    assert (result.dtype, result.shape) == (dtype, (tokens, 48))
    exact = reference.scaled_linear(x, *scaled.operands())
    size = torch.tensor(0.0) if not tokens else exact.abs().amax()
    # The result's rounding, and four in float32: of the sum, the scales' product, the product with it, and the bias.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 4 * 2.0**-24 * (exact.abs() + size)
    assert ((result - exact).abs() <= bound + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).all()
    weight = scaled.weight.double() * scaled.weight_scale.double()[:, None]
    assert ((weight - linear.weight.double()).norm(dim=1) <= 0.04 * linear.weight.double().norm(dim=1)).all()
    assert torch.equal(scaled.weight_scale[0], torch.tensor(0.0))


@every_kind
def test_a_token_does_not_depend_on_other_tokens(kind):
    scaled, x = kind.of(make_linear(64, 32, torch.bfloat16)), torch.randn(40, 64).bfloat16()
    x[3], x[5], x[6], x[7, 2], x[8] = torch.nan, torch.inf, 0.0, -torch.inf, 3e38
    result = scaled(x)
    assert result[[3, 5, 7]].isnan().all()
    assert torch.equal(result[6], scaled.bias)
    others = [row for row in range(40) if row not in (3, 5, 7)]
    assert not result[others].isnan().any()
    for row in others:
        assert torch.equal(scaled(x[row : row + 1])[0], result[row])


@every_kind
def test_shapes_and_dtypes_of_inputs(kind):
    scaled, x = kind.of(make_linear(64, 32, torch.bfloat16)), torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(scaled(x), scaled(x.flatten(0, 1)).view(2, 3, 32))
    assert torch.equal(scaled(x[0, 0]), scaled(x)[0, 0])
    assert torch.equal(scaled(x.transpose(0, 1)), scaled(x).transpose(0, 1))
    wide = scaled(x.float())
    assert wide.dtype == torch.float32
    assert torch.equal(wide, scaled(x).float())
    assert scaled(x[:, :0]).shape == (2, 0, 32)


@every_kind
def test_weights_are_rounded_by_rows(kind):
    linear = make_linear(64, 32, torch.bfloat16)
    scaled = kind.of(linear)
    assert (scaled.weight.dtype, scaled.weight_scale.dtype) == (kind.dtype, torch.float32)
    if kind is Int8GpuLinear:  # as on the CPU
        weight, scale = reference.quantise_weight(linear.weight)
        assert torch.equal(scaled.weight, weight)
        assert torch.equal(scaled.weight_scale, scale)
    else:
        assert scaled.weight.float().abs().amax(1).tolist() == [0.0, *[448.0] * 31]
    assert scaled.bias is linear.bias


@every_kind
def test_side_by_side_is_one_product_with_one_rounding(kind, monkeypatch):
    linears = [kind.of(make_linear(64, 32, torch.bfloat16)) for _ in range(3)]
    x, rounded = torch.randn(9, 64).bfloat16(), []
    expected = torch.cat([linear(x) for linear in linears], dim=1)
    quantise = ops.quantise
    monkeypatch.setattr(ops, "quantise", lambda *arguments: rounded.append(1) or quantise(*arguments))
    assert torch.equal(project_as_one(linears, x), expected)
    assert rounded == [1]
    for other in (nn.Linear(64, 32), kind.of(make_linear(64, 32, torch.float16))):
        assert project_as_one([*linears[:2], other], x) is None
        assert project_as_one([other, *linears[:2]], x) is None
    with monkeypatch.context() as patch:
        patch.setattr(modes, "is_recorded", lambda: True)  # a graph must not hold the kernels' launches
        assert project_as_one(linears, x) is None
    linears[1].register_forward_hook(lambda *_: None)
    assert project_as_one(linears, x) is None


@pytest.mark.skipif(not hasattr(torch.backends, "mkldnn"), reason="no oneDNN")
@every_dtype
def test_the_library_s_product_is_the_reference_s(dtype, monkeypatch):
    """The CPU's, where it takes scales by rows; a GPU's is tested in tests/test_gpu.py."""
    monkeypatch.undo()
    linear, x = make_linear(96, 48, dtype), torch.randn(21, 96).to(dtype)
    scaled = Float8Linear.of(linear)
    try:
        result = scaled(x)
    except RuntimeError as error:
        pytest.skip(f"this torch has no such product: {str(error)[:60]}")
    exact = reference.scaled_linear(x, *scaled.operands())
    assert ((result - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + exact.abs().amax())).all()


@every_kind
def test_no_gradient_flows(kind):
    scaled = kind.of(make_linear(64, 32, torch.bfloat16))
    x = torch.randn(5, 64).bfloat16()
    for training, needed in ((False, True), (True, False)):
        given = x.clone().requires_grad_(needed)
        with pytest.raises(RuntimeError, match=rf"{kind.__name__} cannot be trained.*restore"):
            scaled.train(training)(given)
        with pytest.raises(RuntimeError, match=rf"{kind.__name__} cannot be trained.*restore"):
            project_as_one([scaled] * 3, given)


@every_kind
def test_a_state_that_is_not_rounded_is_rounded_when_it_is_loaded(kind):
    linear, other = (make_linear(64, 32, torch.bfloat16) for _ in range(2))
    scaled, expected = kind.of(linear), kind.of(other)
    scaled.load_state_dict({name: tensor.float() for name, tensor in other.state_dict().items()})
    assert all(torch.equal(each, expected.state_dict()[name]) for name, each in scaled.state_dict().items())
    scaled.load_state_dict(kind.of(linear).state_dict())
    assert torch.equal(scaled.weight, kind.of(linear).weight)


@every_kind
def test_it_stays_where_it_is(kind):
    scaled = kind.of(make_linear(64, 32, torch.bfloat16))
    state, x = {name: tensor.clone() for name, tensor in scaled.state_dict().items()}, torch.randn(5, 64).bfloat16()
    expected = scaled(x)
    for change in (lambda: scaled.half(), lambda: scaled.float(), lambda: scaled.to("meta")):
        with pytest.raises(
            RuntimeError, match=rf"{kind.weights} weights stays in bfloat16 on the CPU, not in.*restore"
        ):
            change()
    scaled.bfloat16().to("cpu")
    assert torch.equal(scaled(x), expected)
    for name, tensor in scaled.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.float(), state[name].float()), name


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", GPU_LINEARS)
@every_dtype
def test_it_is_near_the_model_in_16_bits(weights, dtype):
    exact, model = hidden(load().to(dtype)), make(weights, dtype)
    result = hidden(model)
    assert result.dtype == dtype
    assert torch.cosine_similarity(result[REAL].float(), exact[REAL].float(), dim=-1).min() > COSINES[weights]
    assert torch.equal(hidden(model), result)
    assert not any(type(module) is nn.Linear for module in model.encoder.modules())
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert not any(each.requires_grad for name, each in model.named_parameters() if not name.startswith("pooler"))


@pytest.mark.parametrize("weights", GPU_LINEARS)
def test_hooks_and_compiled_models_give_the_same_numbers(weights):
    model = make(weights)
    expected = hidden(model)
    assert torch.equal(hidden(torch.compile(model, backend="aot_eager")), expected)
    seen = []
    model.encoder.layers[0].self_attn.self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(hidden(model), expected)
    assert seen == [1]


@pytest.mark.parametrize("weights", GPU_LINEARS)
def test_a_layer_rounds_four_inputs(weights, monkeypatch):
    """Of queries, keys and values together, of the attention's result, and of both linears of the feed-forward."""
    model, shapes, quantise = make(weights), [], ops.quantise
    monkeypatch.setattr(ops, "quantise", lambda x, dtype: shapes.append(x.shape[1]) or quantise(x, dtype))
    hidden(model)
    sizes = model.config.hidden_size, model.config.intermediate_size
    assert shapes == [sizes[0], sizes[0], *sizes] * model.config.num_hidden_layers


def saved_and_loaded(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize("weights", GPU_LINEARS)
@every_dtype
@pytest.mark.parametrize("keep", [True, False])
def test_restore_gives_the_very_bits(weights, dtype, keep):
    model = load().to(dtype)
    state, trained = copy.deepcopy(model.state_dict()), [each.requires_grad for each in model.parameters()]
    expected = hidden(model)
    erniem_fast.optimize(model, weights, keep=keep)
    optimised = hidden(model)
    assert not torch.equal(optimised, expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(model)):
        assert torch.equal(hidden(copied), optimised)
    erniem_fast.restore(model)
    assert torch.equal(hidden(model), expected)
    assert [each.requires_grad for each in model.parameters()] == trained
    restored = model.state_dict()
    assert restored.keys() == state.keys()
    for name, tensor in restored.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name


def test_weights_that_are_not_in_the_checkpoint_are_not_restored():
    model = load().bfloat16()
    with torch.no_grad():
        model.encoder.layers[1].linear2.weight[0, 0] += 1.0
    erniem_fast.optimize(model, "float8")
    with pytest.raises(ValueError, match=r"holds other weights.*keep=True"):
        erniem_fast.restore(model)


@pytest.mark.parametrize("weights", GPU_LINEARS)
def test_it_is_not_saved_where_it_could_not_be_loaded(weights, tmp_path):
    with pytest.raises(RuntimeError, match=rf"{weights} weights on a GPU cannot be saved.*restore"):
        make(weights).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_sizes_that_do_not_fit_stay_and_are_named(caplog):
    model = load(intermediate_size=88, ignore_mismatched_sizes=True).bfloat16()
    with caplog.at_level(logging.WARNING, "erniem_fast"):
        erniem_fast.optimize(model, "float8")
    layers = model.encoder.layers
    assert all(type(each) is nn.Linear for layer in layers for each in (layer.linear1, layer.linear2))
    assert isinstance(layers[0].self_attn.out_proj, Float8Linear)
    (message,) = (record.getMessage() for record in caplog.records if "keep their weights" in record.getMessage())
    assert "no multiples of 16" in message
    assert "encoder.layers.0.linear1" in message
    assert "out_proj" not in message
    assert hidden(model).isfinite().all()


# --- What is refused --------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch):
    for weights in GPU_LINEARS:
        with pytest.raises(
            ValueError, match=rf"weights='{weights}' needs a model in bfloat16 or float16.*float32.*bfloat16"
        ):
            erniem_fast.optimize(load(), weights)
    with pytest.raises(ValueError, match=r"has float8 weights already"):
        erniem_fast.optimize(make("float8"), "float8")
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"weights='float8' needs an NVIDIA GPU.*8\.9.*the model is on cpu; use.*'int8'"
    ):
        erniem_fast.optimize(load(), "float8")
    with pytest.raises(ValueError, match=r"weights='int4' is unknown.*'packed', 'bfloat16', 'int8', 'float8'"):
        erniem_fast.optimize(load(), "int4")


@pytest.mark.parametrize(
    ("capability", "weights", "reason"),
    [
        ((9, 0), "float8", None),
        ((8, 9), "float8", None),
        ((12, 0), "int8", None),
        ((8, 0), "int8", None),
        ((8, 0), "float8", "8.9 or later, but cuda:0 has 8.0; use weights='int8' or bfloat16 weights as they are."),
        ((7, 5), "int8", "8.0 or later, but cuda:0 has 7.5; use bfloat16 weights as they are."),
    ],
)
def test_which_gpus_serve(capability, weights, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = gpu_objection(weights, torch.device("cuda:0"))
    assert found is None if reason is None else found.endswith(reason)


def test_status_says_what_a_gpu_serves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    _, float8, int8 = status._weights_on_gpu(torch.device("cuda:0"))
    assert float8.strip().startswith(
        "float8     needs an NVIDIA GPU of compute capability 8.9 or later, but cuda:0 has 8.6"
    )
    assert int8.split() == ["int8", "available"]


def test_amd_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "cuda:0 is AMD's" in gpu_objection("float8", torch.device("cuda:0"))


def test_the_form_of_int8_depends_on_the_device(monkeypatch):
    monkeypatch.undo()
    assert optimize._kinds("int8", torch.device("cuda:0")) == {nn.Linear: Int8GpuLinear}
    assert set(optimize._kinds("int8", torch.device("cpu"))) == {nn.Linear, nn.Embedding}
    assert Int8GpuLinear not in optimize._kinds("int8", torch.device("cpu")).values()
    assert optimize._kinds("float8", torch.device("cpu")) == {nn.Linear: Float8Linear}
    assert math.isclose(reference.largest_of(FLOAT8), 448.0)
