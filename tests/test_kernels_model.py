"""The whole model on the Triton kernels against the whole model on the reference."""

import copy

import pytest
import torch
from equivalence import DEVICE

from erniem_fast import ErnieMConfig, ErnieMModel
from erniem_fast.flags import use_kernels

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture
def mask():
    """A full row, one padded at the right, one at the left, one with a hole."""
    mask = torch.ones(4, 19, dtype=torch.long, device=DEVICE)
    mask[1, 11:] = 0
    mask[2, :13] = 0
    mask[3, 5:9] = 0
    return mask


def outputs_and_gradients(implementation, model, mask):
    """Of a seeded forward and backward; real tokens only, as padding has no meaning."""
    model.zero_grad()
    torch.manual_seed(0)
    ids = torch.randint(3, 100, mask.shape, device=DEVICE)
    with use_kernels(attention=implementation, bias_gelu=implementation, layernorm=implementation):
        hidden = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        # Checkpointed layers run again here, by the flags that are in force here.
        (hidden * torch.linspace(-1, 1, hidden.numel(), device=DEVICE).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=2e-5)
    assert one[1].keys() == other[1].keys()
    largest = max(grad.abs().max() for grad in other[1].values())
    for name, grad in other[1].items():
        # Keys' biases have no gradient but rounding: it is judged by the size of the others.
        bound = 2e-4 * max(grad.abs().max(), 1e-3 * largest)
        assert (one[1][name] - grad).abs().max() <= bound, name


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_same_outputs_gradients_and_dropout(packed, training, mask, poisoned_memory):
    model = ErnieMModel(ErnieMConfig(**CONFIG)).to(DEVICE).train(training)
    kernels = copy.deepcopy(outputs_and_gradients("triton", model, mask))
    assert_same(kernels, outputs_and_gradients("reference", model, mask))


def test_gradient_checkpointing_regenerates_the_masks(mask):
    model = ErnieMModel(ErnieMConfig(**CONFIG)).to(DEVICE).train()
    plain = copy.deepcopy(outputs_and_gradients("triton", model, mask))
    model.gradient_checkpointing_enable()
    assert_same(outputs_and_gradients("triton", model, mask), plain)
