"""What a hook or another module is given or returns stays as it is: no later step of the forward overwrites it."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from erniem_fast import ErnieMConfig, ErnieMForSequenceClassification
from erniem_fast.batch import TokenBatch

LAYERS, HEADS, HIDDEN = 2, 3, 24
# Of few tokens a layer is one native call; of more than 128 the products go to the scratch.
BATCHES = {"few": [9, 4], "many": [80, 64], "many, no padding": [70, 70]}
NEVER_CALLED = ("dropout", "dropout1", "dropout2", "layers", "self_attn")  # the ops do their work, or the layer does


def make_model() -> ErnieMForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": HIDDEN, "intermediate_size": 41}
    model = ErnieMForSequenceClassification(ErnieMConfig(vocab_size=50, layer_norm_eps=0.1, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # biases and layer norms too, which start as zeros and ones
    return model


def make_input(lengths: list[int]) -> dict[str, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long(), "output_hidden_states": True}


def called(model: nn.Module) -> list[str]:
    """The modules that a forward calls, by name."""
    names = [name for name, _ in model.named_modules()]
    inner = ".self_attn.self_attn"
    return [name for name in names if name.endswith(inner) or name.split(".")[-1] not in NEVER_CALLED]


class Keeper:
    """Keeps the tensors that it is shown, and copies of them as they were then."""

    def __init__(self):
        self.kept = []

    def keep(self, *values) -> None:
        for leaf in tree_leaves(values):
            for tensor in vars(leaf).values() if isinstance(leaf, TokenBatch) else [leaf]:
                if isinstance(tensor, Tensor):
                    self.kept.append((tensor, tensor.detach().clone()))

    def assert_nothing_changed(self, of: str) -> None:
        assert self.kept, f"{of} was not called"
        for tensor, copy in self.kept:
            assert torch.equal(tensor, copy), f"a tensor of shape {tuple(copy.shape)} at {of} was overwritten"


@contextmanager
def hooked(keeper, *modules):
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(
                module.register_forward_pre_hook(lambda _, *given: keeper.keep(given), with_kwargs=True)
            )
            hooks.enter_context(module.register_forward_hook(lambda _, *given: keeper.keep(given)))
        yield


@contextmanager
def hooked_globally(keeper, *modules):
    with (
        register_module_forward_pre_hook(lambda _, given: keeper.keep(given)),
        register_module_forward_hook(lambda _, *given: keeper.keep(given)),
    ):
        yield


@contextmanager
def subclassed(keeper, *modules):
    """Other modules in their places, which keep what they compute with."""
    kinds = [type(module) for module in modules]

    def forward(self, *arguments, **options):
        output = forwards[self](*arguments, **options)
        keeper.keep(arguments, options, output)
        return output

    forwards = {module: module.forward for module in modules}
    try:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = type(f"Keeping{kind.__name__}", (kind,), {"forward": forward})
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind


def assert_same(outputs, expected) -> None:
    """A hook takes a module out of its op, and so changes roundings; values of about 1 with an epsilon of 0.1."""
    for name in ("logits", "hidden_states"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=2e-5)


def run_one_by_one(watched, lengths: list[int]) -> None:
    model, inputs = make_model(), make_input(lengths)
    with torch.inference_mode():
        expected = model(**inputs)
        for name in called(model):
            keeper = Keeper()
            with watched(keeper, model.get_submodule(name)):
                outputs = model(**inputs)
            keeper.assert_nothing_changed(name or "the model")
            assert_same(outputs, expected)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("watched", [hooked, subclassed])
def test_at_one_module(watched, lengths, kernels):
    run_one_by_one(watched, lengths)


def test_at_one_module_of_the_padded_layout(monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "0")
    run_one_by_one(hooked, BATCHES["many"])


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("watched", [hooked, hooked_globally, subclassed])
def test_at_all_modules(watched, lengths, kernels, packed):
    model, inputs, keeper = make_model(), make_input(lengths), Keeper()
    with torch.inference_mode():
        expected = model(**inputs)
        with watched(keeper, *map(model.get_submodule, called(model))):
            outputs = model(**inputs)
        model(**make_input(lengths))  # another forward takes no memory of this one's
    keeper.assert_nothing_changed("one of all modules")
    assert_same(outputs, expected)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "not reentrant"])
def test_in_training(checkpointing, packed):
    """Of a backward, too: with dropout, and with layers that run once more."""
    model, inputs, keeper = make_model().train(), make_input(BATCHES["few"]), Keeper()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    leaves = [module for module in map(model.get_submodule, called(model)) if not list(module.children())]
    with hooked(keeper, *map(model.get_submodule, called(model))), ExitStack() as hooks:
        for module in leaves:
            hooks.enter_context(module.register_full_backward_hook(lambda _, *given: keeper.keep(given)))
        outputs = model(**inputs)
        before = len(keeper.kept)
        outputs.logits.square().sum().backward()
    assert len(keeper.kept) > before
    keeper.assert_nothing_changed("one of all modules")
