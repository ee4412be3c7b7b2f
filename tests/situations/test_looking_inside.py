"""Situations of looking inside a model: gradients of rows and layers, hooks, shapes, errors on the way."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from erniem_fast import ErnieMForSequenceClassification
from tests.model.tiny import assert_same_gradients, gradients, load
from tests.situations.truths import (
    BATCH,
    COLUMNS,
    HEADS_AND_LABELS,
    IDS,
    INPUTS,
    MASK,
    REAL,
    ROWS,
    assert_same_results,
    cubes,
    peer_of,
)


def test_the_gradient_of_each_row():
    """By torch.autograd in a loop and at once, and by torch.func; nothing comes from padding or from other rows."""
    model = load(ErnieMForSequenceClassification, num_labels=1)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def scores(embeds):
        return model(inputs_embeds=embeds, attention_mask=MASK).logits[:, 0]

    logits, rows = scores(embeds), torch.eye(ROWS)
    one_by_one = torch.stack([torch.autograd.grad(logits, embeds, row, retain_graph=True)[0] for row in rows])
    (at_once,) = torch.autograd.grad(logits, embeds, rows, is_grads_batched=True, retain_graph=True)
    assert_same_gradients({"at once": at_once}, {"at once": one_by_one})
    assert_same_gradients({"func": torch.func.jacrev(scores)(embeds.detach())}, {"func": one_by_one})
    own = torch.eye(ROWS, dtype=torch.bool)[:, :, None] & REAL
    assert not one_by_one[~own].any()
    assert one_by_one[own].any(-1).all()


def test_hooks_collect_what_layers_compute():
    """The real tokens of all rows, one row after another: the hidden states without padding."""
    model, seen = load(), []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    for mode in (torch.enable_grad, torch.inference_mode):
        seen.clear()
        with mode():
            states = model(**BATCH, output_hidden_states=True).hidden_states
        for output, state in zip(seen, states[1:], strict=True):
            assert torch.equal(output, state[REAL])


def test_the_gradient_of_what_a_layer_computes():
    """Of its result as a hook sees it."""
    model, seen = load(), []
    peer = peer_of(model)
    model.encoder.layers[0].register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    (found,) = torch.autograd.grad(cubes(model), seen[0])
    outputs = peer(**BATCH, output_hidden_states=True)
    (expected,) = torch.autograd.grad(outputs.last_hidden_state[REAL].pow(3).sum(), outputs.hidden_states[1])
    assert_same_gradients({"layer": found}, {"layer": expected[REAL]})


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("where", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
@pytest.mark.parametrize("head", ["classes", "tokens", "spans"])
def test_shapes_without_values(head, where, mode):
    """As memory and time are estimated: shapes of results and gradients, and the count of operations."""
    model_class, config, labels = HEADS_AND_LABELS[head]
    config = load(model_class, dropout=0.3, **config).config
    found = []
    for context in (where, contextlib.nullcontext):
        with context(), mode(), FlopCounterMode(display=False) as counter:
            model = model_class(config).train()
            given = {name: torch.ones(each.shape, dtype=each.dtype) for name, each in labels.items()}
            ids = torch.full((ROWS, COLUMNS), 4)
            outputs = [model(ids, **given, output_attentions=attentions).to_tuple() for attentions in (False, True)]
            if mode is torch.enable_grad:
                sum(loss for loss, *_ in outputs).backward()
        results = [each.shape for each in tree_leaves(outputs)]
        sizes = {name: each.shape for name, each in gradients(model).items()}
        found.append((results, sizes, counter.get_total_flops()))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_an_error_on_the_way_leaves_nothing_behind(mode):
    model, expected = load(), load()
    handle = model.encoder.layers[1].linear1.register_forward_hook(lambda *_: pytest.fail("out of memory"))
    for inputs in INPUTS:
        with mode(), pytest.raises(pytest.fail.Exception, match="out of memory"):
            model(**inputs)
    handle.remove()
    assert_same_results(model, expected)


def test_a_model_that_is_let_go_is_freed():
    """Nothing keeps it or its weights: no cache, no graph, no memory of calls."""
    model = load().train()
    cubes(model).backward()
    with torch.inference_mode():
        model(**INPUTS[1])
    kept = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in kept)
