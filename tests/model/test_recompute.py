"""`ERNIEM_FAST_RECOMPUTE=1`: activations are computed again in the backward, and not kept for it."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erniem_fast import ErnieMConfig, ErnieMModel, use_kernels

LAYERS, TOKENS, INTERMEDIATE = 3, 16, 96
CONFIG = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 25).view(2, 11)
MASK = torch.tensor([[1] * 11, [1] * 5 + [0] * 6])


class Watch(TorchDispatchMode):
    """Notes what runs, and the storages that come out of it, without keeping them alive."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append(function)
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self):
        """Bytes of the storages that are."""
        gc.collect()  # Triton's interpreter leaves cycles
        return [size for storage, size in self._storages.values() if not storage.expired()]

    def products(self):
        return sum(each in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for each in self.calls)


def model_of(**config):
    torch.manual_seed(1)
    return ErnieMModel(ErnieMConfig(**CONFIG, **config)).train()


def step(model, **batch):
    """A seeded forward and backward: the gradients, the bytes alive between the two, and the products of both."""
    batch = batch or {"input_ids": IDS, "attention_mask": MASK}
    model.zero_grad()
    torch.manual_seed(2)
    with Watch() as watch:
        output = model(**batch)
        alive = watch.alive()
        (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
    return {name: each.grad for name, each in model.named_parameters()}, alive, watch.products()


def both(model, monkeypatch):
    """`step` without and with the flag, after making sure of the same gradients."""
    steps = []
    for value in ("0", "1"):
        monkeypatch.setenv("ERNIEM_FAST_RECOMPUTE", value)
        steps.append(step(model))
    (kept, *_), (computed, *_) = steps
    assert all(torch.equal(computed[name], grad) for name, grad in kept.items())
    return steps


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_one_tensor_a_layer_less_is_kept(implementation, monkeypatch):
    """And no matrix product runs twice."""
    with use_kernels(bias_gelu=implementation):
        (_, kept, products), (_, computed, products_again) = both(model_of(), monkeypatch)
    activation = TOKENS * INTERMEDIATE * 4
    assert (kept.count(activation), computed.count(activation)) == (2 * LAYERS, LAYERS)
    assert sum(kept) - sum(computed) == LAYERS * activation
    assert products_again == products


def test_activations_that_are_no_op_of_ours(monkeypatch):
    """Of these the dropout keeps its mask, too."""
    (_, kept, _), (_, computed, _) = both(model_of(hidden_act="silu"), monkeypatch)
    activation = TOKENS * INTERMEDIATE * 4
    assert sum(kept) - sum(computed) >= LAYERS * activation


def test_in_both_layouts(packed, monkeypatch):
    both(model_of(), monkeypatch)


def test_under_gradient_checkpointing(monkeypatch):
    model = model_of()
    expected, *_ = step(model)
    model.gradient_checkpointing_enable()
    (gradients, *_), _ = both(model, monkeypatch)
    assert all(torch.equal(gradients[name], grad) for name, grad in expected.items())


def test_one_graph_of_torch_compile(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setenv("ERNIEM_FAST_RECOMPUTE", "1")
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = {"input_ids": IDS.view(1, -1), "cu_seq_lens_q": torch.tensor([0, 8, 22]), "max_length_q": 14}
    found = []
    for each in (compiled, model):
        model.zero_grad()
        torch.manual_seed(2)
        output = each(**batch)
        (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
        found.append([each.grad for each in model.parameters()])
    # A graph's products may be arranged otherwise, and then add up in another order.
    scale = max(grad.abs().max() for grad in found[1])
    for grad, expected in zip(*found, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5 * scale.item())
