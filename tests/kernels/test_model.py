"""The whole model on the Triton kernels against the whole model on the reference."""

import copy

import peft
import pytest
import torch

from erniem_fast import ErnieMConfig, ErnieMModel
from erniem_fast.flags import use_kernels
from tests.kernels.comparison import DEVICE

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


def make_model(training):
    """Its biases and norms are such that one more or one less shows."""
    model = ErnieMModel(ErnieMConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) / 4
    return model.to(DEVICE).train(training)


def all_kernels(implementation):
    return use_kernels(attention=implementation, bias_gelu=implementation, layernorm=implementation)


def outputs_and_gradients(implementation, model, mask):
    """Of a seeded forward and backward; real tokens only, as padding has no meaning."""
    model.zero_grad()
    torch.manual_seed(0)
    ids = torch.randint(3, 100, mask.shape, device=DEVICE)
    with all_kernels(implementation):
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
    model = make_model(training)
    kernels = copy.deepcopy(outputs_and_gradients("triton", model, mask))
    assert_same(kernels, outputs_and_gradients("reference", model, mask))


def test_gradient_checkpointing_regenerates_the_masks(mask):
    model = make_model(training=True)
    plain = copy.deepcopy(outputs_and_gradients("triton", model, mask))
    model.gradient_checkpointing_enable()
    assert_same(outputs_and_gradients("triton", model, mask), plain)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_lora_on_the_projections(training, mask):
    """Adapted projections add their own bias, plain ones leave it to the kernels."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear1", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(training), config).to(DEVICE).train(training)
    kernels = copy.deepcopy(outputs_and_gradients("triton", model, mask))
    assert len(kernels[1]) == 2 * 2 * 4
    assert_same(kernels, outputs_and_gradients("reference", model, mask))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, training, mask):
    """Products in 16 bits, the residual stream in float32: the kernels' errors against float32 are not the larger ones.

    Over all gradients together, because chance may make the error of a small one twice the reference's: with 8 seeds
    0.79 to 0.91 times the reference's, and the result's 0.15 to 0.21 times.
    """
    model = make_model(training)
    exact = copy.deepcopy(outputs_and_gradients("reference", model, mask))
    with torch.autocast(DEVICE.type, dtype):
        kernels = copy.deepcopy(outputs_and_gradients("triton", model, mask))
        same = outputs_and_gradients("reference", model, mask)
    assert kernels[0].dtype == torch.float32
    largest = max(grad.abs().max() for grad in exact[1].values())
    assert relative_error(kernels[0], exact[0], 0.0) <= relative_error(same[0], exact[0], 0.0)
    errors, errors_of_reference = (
        torch.stack([relative_error(grads[name], grad, largest) for name, grad in exact[1].items()]).norm()
        for grads in (kernels[1], same[1])
    )
    assert errors <= errors_of_reference


def relative_error(value, exact, largest):
    """In the root of the mean of squares; keys' biases, as above, by the size of the others."""
    return (value - exact).norm() / max(exact.norm(), 1e-3 * largest * exact.numel() ** 0.5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_one_graph_of_torch_compile(training):
    """Without breaks, forward and backward, whatever the size: the same numbers as without."""
    torch.compiler.reset()
    model = make_model(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 19], [7, 1], [30, 11]):
        cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
        ids = torch.randint(3, 100, (1, sum(lengths)), device=DEVICE)
        found = []
        for each in (compiled, model):
            model.zero_grad()
            torch.manual_seed(0)
            with all_kernels("triton"):
                output = each(ids, cu_seq_lens_q=cu_seqlens, max_length_q=max(lengths))
            (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
            grads = {name: each.grad for name, each in model.named_parameters()}
            found.append((output.last_hidden_state.detach(), grads))
        # A graph's products may be arranged otherwise, and then add up in another order.
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
        scale = max(grad.abs().max().item() for grad in found[1][1].values())
        for name, grad in found[0][1].items():
            torch.testing.assert_close(grad, found[1][1][name], rtol=0, atol=1e-5 * scale)
