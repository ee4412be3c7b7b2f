"""What the README promises of repeated results, with the weights at any address.

The libraries of the matrix products may add up in another order where an operand is not aligned to a vector, and
safetensors maps weights to any multiple of 8 bytes. So nothing here compares two models bit for bit: only a model with
itself.
"""

import pytest
import torch

from erniem_fast import ErnieMConfig, ErnieMForTokenClassification
from tests.products import every_library, products_by

LINE = 64  # bytes of a line of the cache, to which PyTorch aligns its own tensors
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
STATES = 4  # of three layers, and the embeddings
LENGTHS = {"few tokens": (11, 5, 8, 1), "many tokens": (60, 31, 47, 9)}  # at most 128, and more


def moved(parameter, offset):
    """A copy whose address is `offset` bytes off a line of the cache."""
    size = parameter.numel() * parameter.itemsize
    memory = torch.empty(size + 2 * LINE, dtype=torch.uint8)
    start = -memory.data_ptr() % LINE + offset
    copied = memory[start : start + size].view(parameter.dtype).view(parameter.shape).copy_(parameter)
    assert copied.data_ptr() % LINE == offset
    return copied


@pytest.fixture(params=["aligned", "unaligned"])
def model(request, dtype):
    """Weights where PyTorch puts them, and where safetensors may."""
    torch.manual_seed(7)
    config = ErnieMConfig(
        vocab_size=100,
        hidden_size=96,
        num_hidden_layers=STATES - 1,
        num_attention_heads=3,
        intermediate_size=160,
        max_position_embeddings=66,
        act_dropout=0.1,
        num_labels=3,
    )
    model = ErnieMForTokenClassification(config).to(dtype)
    for parameter in model.parameters():
        parameter.data = moved(parameter.detach(), 0 if request.param == "aligned" else dtype.itemsize)
    return model


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=LENGTHS.values(), ids=LENGTHS)
def batch(request):
    lengths = torch.tensor(request.param)
    mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
    ids = torch.randint(3, 100, mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask}


def step(model, batch):
    """Loss, logits, hidden states and gradients of a seeded step."""
    model.train().zero_grad()
    torch.manual_seed(3)
    outputs = model(**batch, output_hidden_states=True)
    loss = outputs.logits[batch["attention_mask"].bool()].square().sum()  # transformers' losses are of float32
    loss.backward()
    return [loss.detach(), outputs.logits, *outputs.hidden_states, *(each.grad for each in model.parameters())]


def assert_same_bits(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


def test_a_forward_repeats_bit_for_bit(model, batch, packed, kernels):
    model.eval()
    with torch.inference_mode():
        first = model(**batch).logits
        between = [torch.randn(size) for size in (3, 1000, 77777)]  # memory is found elsewhere the second time
        again = model(**{name: each.clone() for name, each in batch.items()}).logits
    assert len(between) == 3
    assert torch.equal(first, again)


def test_a_step_of_training_repeats_bit_for_bit(model, batch, packed, kernels):
    first = step(model, batch)
    assert_same_bits(step(model, {name: each.clone() for name, each in batch.items()}), first)


@every_library
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"], indirect=True)
def test_every_library_of_products_repeats_bit_for_bit(name, model, batch):
    with products_by(name) as calls, torch.inference_mode():
        forward = model.eval()(**batch).logits
        assert torch.equal(model(**batch).logits, forward)
    with products_by(name):
        first = step(model, batch)
        assert_same_bits(step(model, {name: each.clone() for name, each in batch.items()}), first)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same_bits(step(model, batch), first)
    assert calls or name == "native"  # which may be a call for a whole layer


def test_checkpoints_that_are_not_reentrant_change_no_bit(model, batch, packed, kernels):
    expected = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_bits(step(model, batch), expected)


def test_layouts_and_companions_agree_to_rounding(model, batch, dtype, monkeypatch):
    """A sequence in the batch, packed and padded, and alone; dropout draws the same masks in both layouts."""
    real = batch["attention_mask"].bool()
    found = []
    for packing in ("1", "0"):
        monkeypatch.setenv("ERNIEM_FAST_PACKING", packing)
        loss, logits, *rest = step(model, batch)
        states, gradients = rest[:STATES], rest[STATES:]
        # Gradients are measured by the largest of them: that of a key's bias is nothing but roundings.
        found.append(
            [loss, logits[real], *(state[real] for state in states), torch.cat([g.flatten() for g in gradients])]
        )
    for result, other in zip(*found, strict=True):
        assert_rounded_alike(result, other, dtype)
    with torch.inference_mode():
        together = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = model(batch["input_ids"][row : row + 1, :length]).logits
            assert_rounded_alike(together[row, :length], alone[0], dtype)


def assert_rounded_alike(result, other, dtype):
    """To a few roundings of the largest value: the worst seen was 2, with AVX-512, AVX2 and without vectors."""
    assert (result - other).abs().max() <= 8 * torch.finfo(dtype).eps * other.abs().max()
