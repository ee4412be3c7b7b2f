"""Half and double precision, and autocast."""

import copy

import pytest
import torch

from erniem_fast import ErnieMForSequenceClassification, ErnieMForTokenClassification
from tests.model.tiny import EMPTY, IDS, MASK, REAL, assert_close, gradients, load, random_weights, relative_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, model, packed):
    expected = model(IDS, attention_mask=MASK, output_hidden_states=True)
    half = copy.deepcopy(model).to(dtype)
    outputs = half(IDS, attention_mask=MASK, output_hidden_states=True)
    assert {state.dtype for state in (*outputs.hidden_states, outputs.pooler_output)} == {dtype}
    # Each of the 2 layer norms of 2 layers rounds its rows by half a unit; weights and products add as much.
    bound = 4 * torch.finfo(dtype).eps
    for state, of_float32 in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(state[REAL], of_float32[REAL]) < bound
    for each in (half, model):
        each.zero_grad()
        hidden = each(IDS, attention_mask=MASK).last_hidden_state[REAL]
        (hidden.float() * random_weights(hidden)).sum().backward()
    found, of_float32 = gradients(half), gradients(model)
    for name, gradient in of_float32.items():
        if "k_proj.bias" not in name:  # which cancels to zero
            assert found[name].dtype == dtype
            assert relative_error(found[name], gradient) < 4 * bound, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_with_dropout_is_finite(dtype, packed):
    model = load(ErnieMForTokenClassification, dropout=0.3).to(dtype).train()
    model(IDS, attention_mask=MASK, labels=torch.zeros_like(IDS)).loss.backward()
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients(model).values())


@pytest.mark.parametrize("attentions", [False, True])
def test_autocast(attentions, packed):
    """Dtypes as transformers 4.57.6 gives them: layer norms in float32, products in bfloat16."""
    model = load(ErnieMForSequenceClassification)
    found = []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoded = model.ernie_m(IDS, attention_mask=MASK, output_attentions=attentions, output_hidden_states=True)
            logits = model(IDS, attention_mask=MASK, output_attentions=attentions).logits
        if enabled:
            assert {state.dtype for state in encoded.hidden_states} == {torch.float32}
            assert encoded.pooler_output.dtype == logits.dtype == torch.bfloat16
        logits[:EMPTY].float().square().sum().backward()
        found.append((encoded.last_hidden_state[REAL], gradients(model)))
    (hidden, mixed), (expected, exact) = found
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < relative_error(hidden, expected) < 2 * eps
    for name, gradient in exact.items():
        if "k_proj.bias" not in name:
            assert mixed[name].dtype == torch.float32
            assert relative_error(mixed[name], gradient) < 8 * eps, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_against_differences_in_float64(dropout, packed):
    """Along a random direction of all parameters and the embeddings at once."""
    model = load(ErnieMForTokenClassification, dropout, num_labels=3).double().train()
    leaves = {"inputs_embeds": model.get_input_embeddings()(IDS).detach(), **dict(model.named_parameters())}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    generator = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in leaves.items()}

    def loss_at(step):
        moved = {name: leaf + step * direction[name] for name, leaf in leaves.items()}
        torch.manual_seed(3)
        inputs = {"inputs_embeds": moved.pop("inputs_embeds"), "attention_mask": MASK}
        return torch.func.functional_call(model, moved, (), inputs).logits[REAL].pow(3).sum()

    loss = loss_at(0.0)
    assert loss.dtype == torch.float64
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    slope = sum((grad * direction[name]).sum() for grad, name in zip(grads, leaves, strict=True) if grad is not None)
    step = 1e-6
    with torch.no_grad():
        differences = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert differences == pytest.approx(slope.item(), rel=1e-6)


def test_float64_agrees_with_float32(model, packed):
    expected = copy.deepcopy(model).double()(IDS, attention_mask=MASK).last_hidden_state
    assert expected.dtype == torch.float64
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state[REAL].double(), expected[REAL])


def test_a_dtype_may_change_between_forwards(model):
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float64, torch.float16):
            assert model.to(dtype)(IDS, attention_mask=MASK).last_hidden_state.dtype == dtype
    model.load_state_dict(load().state_dict())  # float16 again: rounded as `.half()` rounds
    halved = load().half()(IDS, attention_mask=MASK)[0]
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, halved, atol=8 * torch.finfo(torch.float16).eps)
    model.float().load_state_dict(load().state_dict())
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, expected)
