"""Situations of sizes, activations, dtypes and layouts of weights."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from erniem_fast import ErnieMForSequenceClassification, ErnieMModel
from tests.golden import cases
from tests.model.tiny import assert_close, assert_same_gradients, gradients, load, random_weights, relative_error
from tests.situations.truths import (
    BATCH,
    COLUMNS,
    IDS,
    INPUTS,
    MASK,
    REAL,
    ROWS,
    assert_same_as_peer,
    assert_same_results,
    gradients_of,
    peer_of,
    small_config,
    with_weights,
)


@pytest.mark.parametrize(
    "sizes",
    [(60, 4, 77), (312, 12, 1200), (20, 1, 7), (48, 16, 64), (129, 3, 33)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_sizes_that_no_published_model_has(sizes):
    """Heads of 15, 26, 20, 3 and 43 features; values and the word table's gradient."""
    torch.manual_seed(0)
    model = ErnieMModel(small_config(*sizes)).eval()
    ids = (IDS % 46 + 4).masked_fill(~REAL, cases.PAD)
    found = []
    for each in (model, peer_of(model)):
        with torch.no_grad():
            alone = each(ids[1:2, :7]).last_hidden_state
        hidden = each(ids, attention_mask=MASK).last_hidden_state[REAL]
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden, alone, {"words": each.embeddings.word_embeddings.weight.grad}))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])
    assert_same_gradients(found[0][2], found[1][2])


# Those of transformers that have no parameters of their own.
ACTIVATIONS = sorted(name for name in ACT2FN if not list(ACT2FN[name].parameters()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    model = load(hidden_act=activation)
    assert_same_as_peer(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("norms", ["narrow", "wide"])
def test_half_precision_loses_no_more_than_elsewhere(norms, factor, dtype):
    """Also with sums of thousands before each norm, whose squares float16 cannot hold, and with norms in float32."""
    exact = load()
    with torch.no_grad():
        for layer in exact.encoder.layers:
            for linear in (layer.linear2, layer.self_attn.out_proj):
                for parameter in linear.parameters():
                    parameter.mul_(factor)
    found = []
    for model in (exact, peer_of(exact)):
        half = copy.deepcopy(model).to(dtype)
        if norms == "wide":
            for module in half.modules():
                if isinstance(module, nn.LayerNorm):
                    module.float()
        with torch.no_grad():
            hidden, expected = (each(**BATCH).last_hidden_state[REAL] for each in (half, model.double()))
        found.append(relative_error(hidden, expected))
    assert found[0] <= 2 * found[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_the_models(dtype):
    model = load()
    inputs = [*INPUTS, {"input_ids": IDS, "attention_mask": MASK[:, None].expand(-1, COLUMNS, -1)}]
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            expected = [model(**each).last_hidden_state for each in inputs]
            torch.set_default_dtype(dtype)
            try:
                found = [model(**each).last_hidden_state for each in inputs]
            finally:
                torch.set_default_dtype(torch.float32)
        for hidden, other in zip(found, expected, strict=True):
            assert_close(hidden, other)


LAID_OUT = {
    "transposed": lambda parameter: parameter.mT.contiguous().mT if parameter.dim() == 2 else parameter,
    "every second": lambda parameter: torch.stack([parameter, parameter], -1)[..., 1],
    "views of one buffer": lambda parameter: (
        torch.cat([parameter.flatten()] * 3).narrow(0, parameter.numel(), parameter.numel()).view_as(parameter)
    ),
}


@pytest.mark.parametrize("change", LAID_OUT.values(), ids=LAID_OUT)
def test_layouts_of_weights(change, tmp_path):
    model = with_weights(load(), change)
    assert_same_results(model, load())
    assert_same_gradients(gradients_of(model), gradients_of())
    model.save_pretrained(tmp_path)
    assert_same_results(ErnieMModel.from_pretrained(tmp_path).eval(), load())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_a_scaled_loss(dtype):
    """A step with gradients that are no numbers is left out."""
    labels = torch.arange(ROWS) % 3
    found = []
    for enabled in (True, False):
        model = load(ErnieMForSequenceClassification, num_labels=3).train()
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 2.0**10)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(**BATCH, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append(gradients(model))
    for name, gradient in found[1].items():
        if "k_proj.bias" not in name:  # which cancels to zero
            assert relative_error(found[0][name], gradient) < 8 * torch.finfo(dtype).eps, name
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", 2.0**10)
    scaler.scale(model(**BATCH, labels=labels).loss * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())
