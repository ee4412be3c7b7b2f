"""Layers that are one native call: equal to their ops called one by one, and not taken where those are needed."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from erniem_fast import ErnieMConfig, ErnieMModel, flags
from erniem_fast.flags import use_implementations
from erniem_fast.native import library
from tests.one_calls import record
from tests.products import products_by

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")

LAYERS, HEADS, HIDDEN = 3, 3, 24
NATIVE = {"attention": "native", "bias_gelu": "native", "add_norm": "native"}


def make_model(**changes) -> ErnieMModel:
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": HIDDEN, "intermediate_size": 41}
    model = ErnieMModel(ErnieMConfig(vocab_size=50, layer_norm_eps=0.1, **sizes, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # biases and layer norms too, which start as zeros and ones
    return model


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """The numbers of tokens and of layers of each native call of layers."""
    with products_by("native"):
        yield record(monkeypatch)


def make_input(lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(3, 50, mask.shape).where(mask, 1), "attention_mask": mask.long()}


def op_by_op(model: ErnieMModel, **inputs) -> torch.Tensor:
    """The result of the native ops one after another, which a hook anywhere in a layer brings about."""
    hooks = [layer.norm2.register_forward_hook(lambda *_: None) for layer in model.encoder.layers]
    try:
        return model(**inputs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("lengths", [[4], [1, 2, 1], [16], [17, 0, 9], [33, 31], [65], [100, 28]])
def test_it_is_what_the_ops_are_one_by_one(calls, lengths, activation):
    model, inputs = make_model(hidden_act=activation), make_input(lengths)
    with torch.inference_mode():
        whole = model(**inputs).last_hidden_state
        assert calls == [(sum(max(length, 1) for length in lengths), LAYERS)]  # a pooler reads column 0 even if empty
        # Dropping the hook on norm2 leaves its op to PyTorch's layer norm, and so a rounding of a few units.
        torch.testing.assert_close(whole, op_by_op(model, **inputs), rtol=0, atol=2e-5)
        assert len(calls) == 1


def test_it_is_within_the_goldens_tolerance_of_the_reference_in_float64(calls):
    model, inputs = make_model(), make_input([40, 3, 21])
    with torch.inference_mode():
        whole = model(**inputs).last_hidden_state
        exact = model.double()(**inputs).last_hidden_state
    assert calls == [(64, LAYERS)]
    assert (whole - exact).abs().max() < 2e-5


def test_pruned_heads(calls):
    model, inputs = make_model(), make_input([20, 5])
    model.prune_heads({0: [1], 2: [0, 2]})
    with torch.inference_mode():
        whole = model(**inputs).last_hidden_state
        assert calls == [(25, LAYERS)]
        torch.testing.assert_close(whole, op_by_op(model, **inputs), rtol=0, atol=2e-5)


def test_masks_with_holes_and_without_packing(calls, monkeypatch):
    model = make_model()
    inputs = make_input([30, 12])
    inputs["attention_mask"][0, 3:7] = 0
    with torch.inference_mode():
        for packing in "10":
            monkeypatch.setenv("ERNIEM_FAST_PACKING", packing)
            whole = model(**inputs).last_hidden_state
            torch.testing.assert_close(whole, op_by_op(model, **inputs), rtol=0, atol=2e-5)
    assert calls == [(38, LAYERS), (60, LAYERS)]


def test_hidden_states_that_do_not_lie_in_order(calls):
    """As a hook on a layer can give them to the next."""
    model, inputs = make_model(), make_input([20, 5])
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        for layer in model.encoder.layers:
            layer.register_forward_hook(lambda _, given, output: (output[0].t().contiguous().t(), output[1]))
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert calls == [(25, LAYERS), *[(25, 1)] * LAYERS]


def replace_out(layer):
    layer.self_attn.out_proj = nn.Sequential(layer.self_attn.out_proj)


def replace_up(layer):
    layer.linear1 = nn.Sequential(layer.linear1)


class WeightOnCall(nn.Module):
    """A linear as PyTorch's quantised ones are: its weight is what a function returns."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight = linear, lambda: linear.weight

    def forward(self, x):
        return self.linear(x)


def replace_linears(layer):
    layer.linear1, layer.linear2 = WeightOnCall(layer.linear1), WeightOnCall(layer.linear2)


def hook_linear(layer):
    layer.linear1.register_forward_hook(lambda *_: None)


def hook_attention(layer):
    layer.self_attn.self_attn.register_forward_hook(lambda *_: None)


def replace_attention(layer):
    inner = layer.self_attn.self_attn
    inner.__class__ = type("Mine", (type(inner),), {})


def drop_bias(layer):
    layer.linear2.bias = None


def replace_norm(layer):
    layer.norm1 = nn.Sequential(layer.norm1)


@pytest.mark.parametrize(
    "change",
    [
        replace_out,
        replace_up,
        replace_linears,
        hook_linear,
        hook_attention,
        replace_attention,
        drop_bias,
        replace_norm,
    ],
)
def test_a_layer_that_is_no_plain_one_goes_op_by_op(calls, change):
    model, inputs = make_model(), make_input([20, 5])
    change(model.encoder.layers[1])
    with torch.inference_mode():
        whole = model(**inputs).last_hidden_state
        exact = model.double()(**inputs).last_hidden_state
    assert calls == [(25, 1)] * (LAYERS - 1)
    assert (whole - exact).abs().max() < 2e-5


@pytest.mark.parametrize(
    "options",
    [{"output_attentions": True}, {"head_mask": torch.ones(HEADS)}, {"attention_mask": torch.ones(1, 8, 8)}],
    ids=["attentions", "head mask", "mask per query"],
)
def test_what_it_does_not_compute_goes_op_by_op(calls, options):
    inputs = {"input_ids": torch.randint(3, 50, (1, 8)), **options}
    with torch.inference_mode():
        make_model()(**inputs)
    assert calls == []


def test_flags_training_and_other_dtypes_go_op_by_op(calls, monkeypatch):
    model, inputs = make_model(), make_input([12])
    model(**inputs).last_hidden_state.sum().backward()
    with torch.inference_mode():
        model.train()(**inputs)
        model.eval()
        for op in NATIVE:
            with use_implementations(**{op: "torch"}):
                model(**inputs)
        for name, value in (("ERNIEM_FAST_KERNELS", "off"), ("ERNIEM_FAST_VERIFY", "1")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        model.bfloat16()(**inputs)
        assert calls == []
        with use_implementations(**NATIVE):
            model.float()(**inputs)
        assert calls == [(12, LAYERS)]


def swap_weight(layer):
    layer.linear1.weight.data = torch.randn_like(layer.linear1.weight)


def swap_parameter(layer):
    layer.norm1.bias = nn.Parameter(torch.randn(HIDDEN))


def weight_in_place(layer):
    layer.linear2.weight.data.mul_(-1)


def weight_in_another_order(layer):
    layer.linear2.weight.data = layer.linear2.weight.data.t().contiguous().t()
    layer.linear2.weight.data.mul_(2)


def transposed_weight(layer):
    layer.self_attn.out_proj.weight.data = layer.self_attn.out_proj.weight.data.t()


def fewer_features(layer):
    layer.linear1.weight.data, layer.linear1.bias.data = layer.linear1.weight.data[:30], layer.linear1.bias.data[:30]
    layer.linear2.weight.data = layer.linear2.weight.data[:, :30]


def other_module(layer):
    layer.linear1 = nn.Linear(*reversed(layer.linear1.weight.shape))


def wider_module(layer):
    layer.linear1, layer.linear2 = nn.Linear(HIDDEN, 50), nn.Linear(50, HIDDEN)


def scale_of_attention(layer):
    layer.self_attn.self_attn.scale *= 2


def eps_of_norm(layer):
    layer.norm2.eps *= 2


def prune(layer):
    layer.self_attn.prune_heads({1})


def hook_that_doubles(layer):
    layer.linear2.register_forward_hook(lambda module, given, result: 2 * result)


def hook_on_the_layer(layer):
    layer.register_forward_hook(lambda module, given, result: (2 * result[0], result[1]))


def forward_of_its_own(layer):
    layer.linear2.forward = lambda x: x.new_zeros(*x.shape[:-1], HIDDEN)


CHANGES = (
    swap_weight,
    swap_parameter,
    weight_in_place,
    weight_in_another_order,
    transposed_weight,
    fewer_features,
    other_module,
    wider_module,
    scale_of_attention,
    eps_of_norm,
    prune,
    hook_that_doubles,
    hook_on_the_layer,
    forward_of_its_own,
)


@pytest.mark.parametrize("outputs", [False, True], ids=["the encoder's", "each layer's"])
@pytest.mark.parametrize("change", [*CHANGES, replace_out, replace_attention, drop_bias, replace_norm])
def test_what_changes_after_a_call_counts_in_the_next(calls, change, outputs):
    """The next call gives what a copy gives, for which nothing is prepared."""
    model, inputs = make_model(), {**make_input([20, 5]), "output_hidden_states": outputs}
    with torch.inference_mode():
        before = model(**inputs).last_hidden_state
    change(model.encoder.layers[1])
    with torch.inference_mode():
        after, expected = (each(**inputs).last_hidden_state for each in (model, copy.deepcopy(model)))
        assert torch.equal(after, expected)
        assert change in (replace_out, replace_attention, replace_norm) or not torch.equal(after, before)
        if change is weight_in_another_order:  # its copy in order must not be kept
            model.encoder.layers[1].linear2.weight.data.mul_(2)
            assert not torch.equal(model(**inputs).last_hidden_state, after)


def test_layers_that_are_removed_or_added(calls):
    model, inputs = make_model(), make_input([20, 5])
    with torch.inference_mode():
        first, second, third = model(**inputs, output_hidden_states=True).hidden_states[1:]
        calls.clear()
        last = model.encoder.layers[2]
        del model.encoder.layers[2]
        assert torch.equal(model(**inputs).last_hidden_state, second)
        model.encoder.layers.append(last)
        assert torch.equal(model(**inputs).last_hidden_state, third)
        del model.encoder.layers[1:]
        assert torch.equal(model(**inputs).last_hidden_state, first)
    assert calls == [(25, 2), (25, 3), (25, 1)]


def test_hooks_that_are_gone_and_models_that_are_saved(calls):
    model, inputs = make_model(), make_input([20, 5])
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        op_by_op(model, **inputs)
        assert torch.equal(model(**inputs).last_hidden_state, expected)
        again = pickle.loads(pickle.dumps(model))
        assert again.encoder.prepared is None
        assert torch.equal(again(**inputs).last_hidden_state, expected)
    assert calls == [(25, LAYERS)] * 3


def test_a_forward_keeps_no_tensors_for_its_flags():
    """A layer's input was part of what the flags remember, and lived until the end of the forward."""
    model, inputs = make_model(), make_input([200])  # so many that each layer is asked
    with flags.held(), torch.inference_mode():
        model(**inputs)
        memo = flags.snapshot().memo
    assert memo
    assert not [each for each in tree_leaves(list(memo)) if isinstance(each, torch.Tensor)]


def test_what_is_prepared_does_not_keep_a_model(calls):
    def run_hooked() -> weakref.ref:
        model = make_model()
        with torch.inference_mode():
            model(**make_input([5]))
            model.encoder.layers[0].linear1.register_forward_hook(lambda *_: model and None)  # a cycle, as hooks make
            model(**make_input([5]), output_hidden_states=True)
        return weakref.ref(model.encoder)

    encoder = run_hooked()
    gc.collect()
    assert encoder() is None
