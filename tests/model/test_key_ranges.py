"""Layers whose tokens attend to ranges of their sequence, as CAMLM's do, on every path through the encoder.

CAMLM (Ouyang et al., arXiv 2012.15674) predicts the masked tokens of a sentence from its translation. A pair is laid
out as [masks of B, tokens of A, tokens of B, masks of A]: each token attends to its own sentence's tokens, each mask to
the masks of its own sentence and to the tokens of the other, and all of these stand side by side.
"""

import pytest
import torch

from erniem_fast import flags, one_call, optimize, use_kernels
from erniem_fast.flags import use_implementations
from erniem_fast.native import library
from tests.batches import sequences
from tests.model.test_kernel_layers import TRITON
from tests.model.tiny import HIDDEN, assert_same_gradients, gradients, load
from tests.one_calls import record
from tests.products import products_by

PAIRS = ((2, 9, 7, 3), (1, 4, 12, 5), (3, 20, 1, 0))
MASKS_OF_B, A, B, MASKS_OF_A = range(4)
PART = torch.cat([torch.arange(4).repeat_interleave(torch.tensor(pair)) for pair in PAIRS])
# What is rounded in another order: of values about 1, a hundred roundings of 1.2e-7.
ATOL = 1e-5


def camlm():
    """The batch of all pairs."""
    ranges = []
    for pair in PAIRS:
        starts = torch.tensor([0, *pair]).cumsum(0)
        seen = torch.tensor([[0, 2], [1, 2], [2, 3], [2, 4]])
        ranges.append(starts[seen].repeat_interleave(torch.tensor(pair), dim=0))
    return sequences(*map(sum, PAIRS)).attending_to(torch.cat(ranges).int())


BATCH = camlm()


def sees(query, key):
    """By CAMLM's own rule, whether one token attends to another."""
    if BATCH.sequences.sequence_ids[query] != BATCH.sequences.sequence_ids[key]:
        return False
    return PART[key] in {MASKS_OF_B: (MASKS_OF_B, A), A: (A,), B: (B,), MASKS_OF_A: (MASKS_OF_A, B)}[int(PART[query])]


SEES = torch.tensor([[sees(query, key) for key in range(BATCH.tokens)] for query in range(BATCH.tokens)])


def inputs(dtype=torch.float32):
    return torch.randn(BATCH.tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)


def encode(model, x, batch=BATCH, **options):
    hidden, states, _ = model.encoder(x, batch, None, **options)
    return states if options else hidden


def by_dense_mask(model, x):
    """The same by a mask per query over all tokens, as one row."""
    bias = torch.zeros(SEES.shape).masked_fill(~SEES, -torch.inf)
    row = sequences(BATCH.tokens)
    hidden, _, _ = model.encoder(x, row, None, scores_bias=bias[None, None])
    return hidden


def test_every_layer_is_that_of_a_dense_mask(kernels):
    model = load().double()
    torch.testing.assert_close(
        encode(model, inputs(torch.float64)), by_dense_mask(model, inputs(torch.float64)), rtol=0, atol=1e-12
    )
    with torch.no_grad():
        single = encode(model.float(), inputs())
    torch.testing.assert_close(single, by_dense_mask(model, inputs()), rtol=0, atol=ATOL)


@pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_native_layers_in_one_call(weights, monkeypatch):
    model = load()
    if weights == "int8":
        optimize(model, weights="int8")
    with products_by("native"), torch.inference_mode():
        expected = encode(model, inputs(), output_hidden_states=True)[-1]
        calls = record(monkeypatch)
        whole = encode(model, inputs())
    assert calls == [(BATCH.tokens, len(model.encoder.layers))]
    torch.testing.assert_close(whole, expected, rtol=0, atol=ATOL)


def counted(monkeypatch, owner, name):
    """A list that has an entry for each call of a function from now on."""
    calls, function = [], getattr(owner, name)

    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(owner, name, noted)
    return calls


def test_triton_layers_without_their_modules(monkeypatch):
    model, calls = load(), counted(monkeypatch, one_call.KernelLayers, "__call__")
    with torch.inference_mode(), use_implementations(**TRITON):
        whole = encode(model, inputs())
    assert len(calls) == 1
    torch.testing.assert_close(whole, by_dense_mask(model, inputs()), rtol=0, atol=ATOL)


def loss_and_gradients(model, encoded):
    model.zero_grad()
    (encoded * torch.linspace(-1, 1, HIDDEN)).square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_dense_mask(checkpointing, kernels):
    model = load().train()
    expected = loss_and_gradients(model, by_dense_mask(model, inputs()))
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert_same_gradients(loss_and_gradients(model, encode(model, inputs().requires_grad_())), expected)


def test_gradients_of_layers_that_are_one_function(monkeypatch):
    model, calls = load().train(), counted(monkeypatch, one_call.kernel_training, "run")
    with use_implementations(**TRITON):
        found = loss_and_gradients(model, encode(model, inputs()))
    assert len(calls) == len(model.encoder.layers)
    assert_same_gradients(found, loss_and_gradients(model, by_dense_mask(model, inputs())))


@pytest.mark.parametrize("implementation", ["reference", "torch", "native", "triton"])
def test_no_token_of_its_own_sentence_reaches_a_prediction(implementation):
    """In any layer: by gradients, and by the bits of what is predicted. The other sentence's tokens do reach it."""
    if implementation == "native" and not library.is_built("cpu"):
        pytest.skip("the native library cannot be built here")
    model = load()
    with use_kernels(attention=implementation):
        for masks, own, other in ((MASKS_OF_A, A, B), (MASKS_OF_B, B, A)):
            x = inputs().requires_grad_()
            for state in encode(model, x, output_hidden_states=True)[1:]:
                (grad,) = torch.autograd.grad(state[masks == PART].square().sum(), x, retain_graph=True)
                assert not grad[own == PART].any()
                assert bool((grad[other == PART] != 0).any(-1).sum() >= 19)  # the last pair has no masks of A
            with torch.no_grad():
                predicted = encode(model, x)[masks == PART]
                changed = {
                    part: encode(model, torch.where((part == PART)[:, None], x + 1.0, x))[masks == PART]
                    for part in (own, other)
                }
            assert torch.equal(changed[own], predicted)
            assert not torch.equal(changed[other], predicted)


def test_graphs_of_compile_and_the_flag_that_verifies(monkeypatch):
    model, batch = load().encoder.layers[0], BATCH
    with products_by("torch"):  # as compiled graphs and verified calls multiply
        expected, _ = model(inputs(), batch, None)
    with torch.no_grad():
        compiled = torch.compile(lambda x: model(x, batch, None)[0], fullgraph=True, backend="aot_eager")(inputs())
    torch.testing.assert_close(compiled, expected, rtol=0, atol=ATOL)
    monkeypatch.setenv(flags.VERIFY.name, "1")
    assert torch.equal(model(inputs(), batch, None)[0], expected)
