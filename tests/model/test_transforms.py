"""Forward-mode derivatives, torch.func and vmap."""

import copy

import pytest
import torch
from torch.autograd import forward_ad

from erniem_fast import ErnieMForSequenceClassification
from tests.model.tiny import IDS, MASK, ROWS, assert_close, assert_same_gradients, gradients, load, random_weights


def embedded(model):
    return model.embeddings.word_embeddings(IDS).detach()


def of_embeddings(model):
    """The sum of cubed states as a function of the embeddings."""
    return lambda embeds: model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state.pow(3).sum()


def along(function, embeds, direction, step=1e-6):
    """The derivative of a function in float64, by differences."""
    embeds, direction = embeds.double(), direction.double()
    return (function(embeds + step * direction) - function(embeds - step * direction)) / (2 * step)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_derivatives(mode, frozen, model, packed, kernels):
    model.requires_grad_(not frozen)
    embeds = embedded(model)
    direction = random_weights(embeds)
    with mode():
        _, transformed = torch.func.jvp(of_embeddings(model), (embeds,), (direction,))
        with forward_ad.dual_level():
            value = of_embeddings(model)(forward_ad.make_dual(embeds, direction))
            dual = forward_ad.unpack_dual(value).tangent
    expected = along(of_embeddings(model.double()), embeds, direction).item()
    assert transformed.item() == pytest.approx(expected, rel=1e-4)
    assert dual.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_by_torch_func(dropout, packed, kernels):
    model = load(ErnieMForSequenceClassification, num_labels=3, dropout=dropout).train()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.arange(ROWS) % 3}
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    torch.manual_seed(3)
    found = torch.func.grad(lambda these: torch.func.functional_call(model, these, (), inputs).loss)(parameters)
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    assert_same_gradients(found, gradients(model))


def test_second_derivatives(model, packed, kernels):
    """By torch.func against differences; by two backwards they are refused."""
    embeds = embedded(model)
    direction = random_weights(embeds)
    found = torch.func.grad(lambda x: (torch.func.grad(of_embeddings(model))(x) * direction).sum())(embeds)
    of_double = torch.func.grad(of_embeddings(copy.deepcopy(model).double()))
    expected = along(of_double, embeds, direction).detach()
    assert_close(found.detach().double(), expected, atol=1e-4 * expected.abs().max().item())
    embeds.requires_grad_()
    (grad,) = torch.autograd.grad(of_embeddings(model)(embeds), embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="gives no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_vmap(mode, packed, kernels):
    """Over the parameters of several models, and over embeddings; not over what decides which tokens there are."""
    models = [load(), load()]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    stacked, _ = torch.func.stack_module_state(models)
    inputs = {"input_ids": IDS, "attention_mask": MASK}

    def states(parameters):
        return torch.func.functional_call(models[0], parameters, (), inputs).last_hidden_state

    rows = embedded(models[0])
    with mode():
        for found, each in zip(torch.vmap(states)(stacked), models, strict=True):
            assert_close(found, each(**inputs).last_hidden_state)
        found = torch.vmap(lambda row: models[0](inputs_embeds=row[None]).last_hidden_state[0])(rows)
        assert_close(found, models[0](inputs_embeds=rows).last_hidden_state)
        with pytest.raises(ValueError, match="input_ids is mapped over by"):
            torch.vmap(lambda row: models[0](row[None]).last_hidden_state)(IDS)
