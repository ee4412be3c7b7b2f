"""Training, evaluation, inference and gradient checkpointing."""

import pytest
import torch
from torch import nn

import erniem_fast
from erniem_fast import ErnieMForSequenceClassification, ErnieMForTokenClassification
from tests.model.tiny import IDS, MASK, REAL, ROWS, Calls, assert_close, assert_same_gradients, gradients, load


def test_training_and_evaluation(packed):
    model = load(dropout=0.3)
    state = torch.get_rng_state()
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not draw random numbers"
    model.train()
    trained = []
    for _ in range(2):
        torch.manual_seed(3)
        trained.append([model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2)])
    assert torch.equal(trained[0][0], trained[1][0])
    assert torch.equal(trained[0][1], trained[1][1])
    assert not torch.equal(trained[0][0], trained[0][1])
    assert torch.equal(model.eval()(IDS, attention_mask=MASK).last_hidden_state, expected)


@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_dropout_keeps_the_mean(implementation):
    """Of many draws: the mean of the embeddings is what evaluation gives, off by as much as chance explains."""
    model, draws = load(dropout=0.3), 300
    arguments = {"input_ids": IDS[:1], "output_hidden_states": True}
    with torch.no_grad(), erniem_fast.use_kernels(embeddings=implementation):
        expected = model(**arguments).hidden_states[0]
        model.train()
        drawn = torch.stack([model(**arguments).hidden_states[0] for _ in range(draws)])
    deviations = (drawn.mean(0) - expected) / (drawn.std(0) / draws**0.5).clamp(min=1e-6)
    assert deviations.abs().mean() == pytest.approx((2 / torch.pi) ** 0.5, rel=0.1)
    assert (drawn == 0).float().mean() == pytest.approx(0.3, abs=0.01)


def test_dropout_modules_alone_in_training_draw_anew():
    """Monte Carlo dropout: an evaluated model whose dropouts are switched on."""
    model = load(dropout=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(3)
    first, second = (model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2))
    assert (first - second)[REAL].abs().max() > 0.1
    torch.manual_seed(3)
    assert torch.equal(model(IDS, attention_mask=MASK).last_hidden_state, first)
    torch.manual_seed(3)
    assert torch.equal(model.train()(IDS, attention_mask=MASK).last_hidden_state, first)


def test_dropout_modules_alone_in_evaluation_or_replaced_do_nothing():
    expected = load()(IDS, attention_mask=MASK).last_hidden_state
    model = load(dropout=0.3).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, expected)
    model = load(dropout=0.3).train()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())
    assert_close(model(IDS, attention_mask=MASK).last_hidden_state, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_between_training_steps(mode, packed):
    found = []
    for evaluates in (True, False):
        model = load(ErnieMForSequenceClassification, num_labels=3).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(IDS, attention_mask=MASK, labels=torch.arange(ROWS) % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                with mode():
                    evaluated = model.eval()(IDS, attention_mask=MASK).logits
                    trained = model.train()(IDS, attention_mask=MASK).logits
                assert torch.equal(evaluated, trained)
        found.append(model.eval()(IDS, attention_mask=MASK).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attentions", [False, True])
def test_gradient_checkpointing(reentrant, attentions, packed):
    """With dropout: the backward runs every layer again and draws the masks of the forward.

    Bit for bit, except that a reentrant checkpoint's first run has no autograd: queries, keys and values are products
    of their own then, and few tokens may be one native call, which may add up in another order.
    """
    found = []
    for checkpointing in (True, False):
        model, runs = load(ErnieMForTokenClassification, dropout=0.3).train(), []
        for layer in model.ernie_m.encoder.layers:
            layer.self_attn.self_attn.register_forward_hook(lambda *_, runs=runs, layer=layer: runs.append(layer))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.ernie_m.encoder.layers)
        torch.manual_seed(3)
        arguments = {"attention_mask": MASK, "output_attentions": attentions, "output_hidden_states": True}
        # The hook that checkpointing puts on the word embeddings keeps them out of the op, whose kernel may round
        # otherwise than this.
        with erniem_fast.use_kernels(embeddings="torch"):
            outputs = model(IDS, **arguments, labels=torch.zeros_like(IDS))
        outputs.loss.backward()
        layers = list(model.ernie_m.encoder.layers)
        assert runs == (layers + layers[::-1] if checkpointing else layers)
        found.append((outputs.loss, *outputs.hidden_states, *gradients(model).values()))
    assert len(found[0]) == len(found[1])
    if reentrant:
        for once, again in zip(*found, strict=True):
            assert_close(again, once, atol=1e-5 * max(1.0, once.abs().max().item()))
    else:
        assert all(map(torch.equal, *found))


def test_gradient_checkpointing_leaves_the_embeddings_whole():
    """transformers hooks the word table whenever checkpointing is enabled, which must not take the op apart."""
    model = load().train()
    model.gradient_checkpointing_enable()
    with Calls() as calls:
        model(IDS, attention_mask=MASK)
    assert "erniem_fast::embeddings" in calls.names


def test_checkpointing_of_a_frozen_model_with_input_gradients():
    """How adapters are trained: the hook on the word embeddings makes the checkpoints differentiable."""
    model = load(ErnieMForSequenceClassification).train()
    model.requires_grad_(False)
    model.ernie_m.encoder.layers[0].linear1.weight.requires_grad_()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, attention_mask=MASK).logits.square().sum().backward()
    expected = load(ErnieMForSequenceClassification).train()
    expected(IDS, attention_mask=MASK).logits.square().sum().backward()
    weight = "ernie_m.encoder.layers.0.linear1.weight"
    assert_same_gradients(gradients(model), {weight: gradients(expected)[weight]})
