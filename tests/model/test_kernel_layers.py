"""Layers by kernels and products alone: the bits of their ops one by one, and not taken where those are needed."""

import copy
from collections.abc import Iterator

import pytest
import torch

from erniem_fast import ErnieMModel, one_call
from erniem_fast.flags import use_implementations
from erniem_fast.kernel_layers import KernelLayers
from tests.native.test_layer import (
    CHANGES,
    HEADS,
    LAYERS,
    drop_bias,
    hook_attention,
    hook_linear,
    make_input,
    make_model,
    replace_attention,
    replace_norm,
    replace_out,
    replace_up,
)

TRITON = {"attention": "triton", "bias_gelu": "triton", "add_norm": "triton"}


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """The numbers of tokens and of layers of each call of layers, where every op is Triton's."""
    seen, call = [], KernelLayers.__call__

    def recorded(layers, x, sequences):
        seen.append((len(x), len(layers.layers)))
        return call(layers, x, sequences)

    monkeypatch.setattr(KernelLayers, "__call__", recorded)
    with use_implementations(**TRITON):
        yield seen


@torch.inference_mode()
def hidden(model: ErnieMModel, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs).last_hidden_state


def op_by_op(model: ErnieMModel, **inputs: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_call, "run", lambda *_: None)
        return hidden(model, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("lengths", [[4], [17, 0, 9], [70, 2]])
def test_it_is_what_the_ops_are_one_by_one(calls, lengths, activation, dtype):
    model, inputs = make_model(hidden_act=activation).to(dtype), make_input(lengths)
    whole = hidden(model, **inputs)
    assert calls == [(sum(max(length, 1) for length in lengths), LAYERS)]  # a pooler reads column 0 even if empty
    assert torch.equal(whole, op_by_op(model, **inputs))
    assert len(calls) == 1


def test_pruned_heads_and_masks_with_holes(calls, monkeypatch):
    model, inputs = make_model(), make_input([20, 5])
    model.prune_heads({0: [1], 2: [0, 2]})
    inputs["attention_mask"][0, 3:7] = 0
    for packing in "10":
        monkeypatch.setenv("ERNIEM_FAST_PACKING", packing)
        assert torch.equal(hidden(model, **inputs), op_by_op(model, **inputs))
    assert calls == [(21, LAYERS), (40, LAYERS)]


def test_hidden_states_that_do_not_lie_in_order(calls):
    model, inputs = make_model(), make_input([20, 5])
    expected = hidden(model, **inputs)
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _, given, output: (output[0].t().contiguous().t(), output[1]))
    assert torch.equal(hidden(model, **inputs), expected)
    assert calls == [(25, LAYERS), *[(25, 1)] * LAYERS]


@pytest.mark.parametrize(
    "change", [replace_out, replace_up, hook_linear, hook_attention, replace_attention, drop_bias, replace_norm]
)
def test_a_layer_that_is_no_plain_one_goes_op_by_op(calls, change):
    model, inputs = make_model(), make_input([20, 5])
    change(model.encoder.layers[1])
    assert torch.equal(hidden(model, **inputs), op_by_op(model, **inputs))
    assert calls == [(25, 1)] * (LAYERS - 1)


@pytest.mark.parametrize(
    "options",
    [{"output_attentions": True}, {"head_mask": torch.ones(HEADS)}, {"attention_mask": torch.ones(1, 8, 8)}],
    ids=["attentions", "head mask", "mask per query"],
)
def test_what_it_does_not_compute_goes_op_by_op(calls, options):
    hidden(make_model(), **{"input_ids": torch.randint(3, 50, (1, 8)), **options})
    assert calls == []


def test_flags_training_and_parameters_of_two_dtypes_go_op_by_op(calls, monkeypatch):
    model, inputs = make_model(), make_input([12])
    model(**inputs).last_hidden_state.sum().backward()
    hidden(model.train(), **inputs)
    model.eval()
    for op in TRITON:
        with use_implementations(**{op: "torch"}):
            hidden(model, **inputs)
    with monkeypatch.context() as patch:
        patch.setenv("ERNIEM_FAST_VERIFY", "1")
        hidden(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        hidden(model, **inputs)
    assert calls == []
    model.encoder.layers[1].linear1.bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):  # PyTorch's, of a product of two dtypes
        hidden(model, **inputs)
    assert calls == [(12, 1)]
    hidden(model.float(), **inputs)
    assert calls == [(12, 1), (12, LAYERS)]


@pytest.mark.parametrize("change", [*CHANGES, drop_bias])
def test_what_changes_after_a_call_counts_in_the_next(calls, change):
    """The next call gives what a copy gives, for which nothing is prepared."""
    model, inputs = make_model(), make_input([20, 5])
    before = hidden(model, **inputs)
    change(model.encoder.layers[1])
    after, expected = (hidden(each, **inputs) for each in (model, copy.deepcopy(model)))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)  # a copy may lie in another order
    assert not torch.equal(after, before)


def test_ways_take_turns(calls):
    """A model that ran natively runs by kernels when the flags ask for them, and again natively."""
    model, inputs = make_model(), make_input([20, 5])
    expected = hidden(model, **inputs)
    with use_implementations(**dict.fromkeys(TRITON, "torch")):
        hidden(model, **inputs)
    with use_implementations(**dict.fromkeys(TRITON, "native")):
        torch.testing.assert_close(hidden(model, **inputs), expected, rtol=0, atol=2e-5)
    assert torch.equal(hidden(model, **inputs), expected)
    assert calls == [(25, LAYERS)] * 2
