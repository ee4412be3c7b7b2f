"""A layer's training by kernels and products as one function: the gradients of its ops, and not taken where those are
needed."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call

from erniem_fast import one_call
from erniem_fast.flags import use_implementations
from tests.model.test_kernel_layers import TRITON
from tests.native.test_layer import LAYERS, make_input, make_model

RATES = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "act_dropout": 0.1}


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[int]]:
    """The numbers of tokens of the layers that were one function, where every op is Triton's."""
    seen, run = [], one_call.kernel_training.run

    def recorded(layer, x, *rest):
        seen.append(len(x))
        return run(layer, x, *rest)

    monkeypatch.setattr(one_call.kernel_training, "run", recorded)
    with use_implementations(**TRITON):
        yield seen


def gradients(model, inputs, **options):
    """The loss and the gradients of all parameters, by name; dropout draws the same masks each time."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs, **options)
    loss = (output.last_hidden_state * torch.linspace(-1, 1, output.last_hidden_state.shape[-1])).square().sum()
    loss.backward()
    return {"loss": loss.detach(), **{name: each.grad for name, each in model.named_parameters()}}


def op_by_op(model, inputs, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_call, "run_with_gradients", lambda *_: None)
        return gradients(model, inputs, **options)


def assert_same(found, expected):
    """Sums in another order differ by roundings of the largest number; those of keys' biases are 0 but for these."""
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        if each is None:
            assert found[name] is None, name
            continue
        error = (found[name] - each).abs().max() / each.abs().max().clamp(min=1.0)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("rates", [{}, RATES], ids=["plain", "dropout"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_gradients_are_those_of_the_ops(calls, activation, rates):
    rates = {**dict.fromkeys(RATES, 0.0), **rates}
    model, inputs = make_model(hidden_act=activation, **rates).train(), make_input([17, 9])
    inputs["attention_mask"][0, 3:5] = 0
    found = gradients(model, inputs)
    assert calls == [24] * LAYERS
    assert_same(found, op_by_op(model, inputs))
    assert len(calls) == LAYERS


def test_pruned_heads_hidden_states_and_the_padded_layout(calls, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "0")
    model, inputs = make_model(**RATES).train(), make_input([17, 9])
    model.prune_heads({0: [1], 2: [0, 2]})
    assert_same(gradients(model, inputs, output_hidden_states=True), op_by_op(model, inputs))
    assert calls == [34] * LAYERS


def test_frozen_parameters_get_no_gradients(calls):
    model, inputs = make_model().train(), make_input([12, 5])
    for name, each in model.named_parameters():
        each.requires_grad_("layers.1.linear1.weight" in name or "layers.2.self_attn.self_attn.k_proj.bias" in name)
    found = gradients(model, inputs)
    assert sum(each is not None for each in found.values()) == 3
    assert_same(found, op_by_op(model, inputs))
    assert calls == [17] * LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(calls, reentrant):
    model, inputs = make_model(**RATES).train(), make_input([12, 5])
    expected = op_by_op(model, inputs)
    model.get_input_embeddings().weight.requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, inputs), expected)
    assert calls == [17] * (LAYERS if reentrant else 2 * LAYERS)


def test_saved_tensors_may_be_packed(calls):
    model, inputs = make_model().train(), make_input([12, 5])
    expected = gradients(model, inputs)
    with save_on_cpu():
        assert_same(gradients(model, inputs), expected)


def test_maps_over_gradients(calls):
    model, inputs = make_model().train(), make_input([7])
    weight = model.encoder.layers[1].linear1.weight
    torch.manual_seed(3)
    out = model(**inputs).last_hidden_state
    grads = torch.randn(3, *out.shape)
    (together,) = torch.autograd.grad(out, weight, grads, is_grads_batched=True, retain_graph=True)
    for grad, each in zip(grads, together, strict=True):
        (alone,) = torch.autograd.grad(out, weight, grad, retain_graph=True)
        assert (alone - each).abs().max() < 1e-5 * alone.abs().max()
    assert len(calls) == LAYERS


def test_second_derivatives_are_refused_by_name(calls):
    model = make_model().train()
    out = model(**make_input([7])).last_hidden_state
    (grad,) = torch.autograd.grad(out.square().sum(), model.encoder.layers[0].norm1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated: backward"):
        grad.sum().backward()
    assert len(calls) == LAYERS


def test_a_weight_that_has_changed_since_is_refused(calls):
    model = make_model().train()
    loss = model(**make_input([7])).last_hidden_state.sum()
    with torch.no_grad():
        model.encoder.layers[1].linear2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(calls) == LAYERS


def test_what_needs_modules_or_ops_goes_op_by_op(calls, monkeypatch):
    model, inputs = make_model().train(), make_input([7])
    for name in ("ERNIEM_FAST_VERIFY", "ERNIEM_FAST_RECOMPUTE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        gradients(model, inputs)
    gradients(model, inputs, output_attentions=True)
    gradients(model, inputs, head_mask=torch.ones(3))
    with use_implementations(attention="torch"):
        gradients(model, inputs)
    with torch.no_grad():
        model(**inputs)
    assert calls == []
    other = copy.deepcopy(model)
    other.encoder.layers[1].linear1.register_forward_hook(lambda *_: None)
    gradients(other, inputs)
    assert calls == [7] * (LAYERS - 1)


def test_gradients_are_of_the_parameters_that_a_model_has_now(calls):
    """Not of those before that held the same numbers in the same memory."""
    model, inputs = make_model().train(), make_input([7])
    expected = gradients(model, inputs)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.data))
    assert_same(gradients(model, inputs), expected)
    for _ in range(2):
        given = {name: each.detach().requires_grad_() for name, each in model.named_parameters()}
        torch.manual_seed(3)
        output = functional_call(model, given, kwargs=inputs).last_hidden_state
        (output * torch.linspace(-1, 1, output.shape[-1])).square().sum().backward()
        assert_same({"loss": expected["loss"], **{name: each.grad for name, each in given.items()}}, expected)
    assert len(calls) == 4 * LAYERS


def test_maps_over_gradients_of_parameters_that_a_call_borrows(calls):
    """The modules have their own again when the backward runs."""
    model, inputs = make_model().train(), make_input([7])
    borrowed = {name: each.detach() * 1.1 for name, each in model.named_parameters()}
    weight = borrowed["encoder.layers.1.linear1.weight"].requires_grad_()
    torch.manual_seed(3)
    out = torch.func.functional_call(model, borrowed, kwargs=inputs).last_hidden_state
    grad = torch.randn_like(out)
    (alone,) = torch.autograd.grad(out, weight, grad, retain_graph=True)
    (batched,) = torch.autograd.grad(out, weight, grad[None], is_grads_batched=True)
    assert (alone - batched[0]).abs().max() < 1e-5 * alone.abs().max()
    assert len(calls) == LAYERS
