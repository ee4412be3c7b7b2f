"""What a checkpoint runs again in the backward runs under the flags of its forward, whatever they are by then."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

from erniem_fast import ErnieMConfig, ErnieMModel, flags
from erniem_fast.flags import use_implementations

IDS = torch.arange(3, 25).view(2, 11)
MASK = torch.tensor([[1] * 11, [1] * 5 + [0] * 6])
CONFIG = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def model_of(checkpointing: bool | None) -> ErnieMModel:
    """`checkpointing`: None for none, else whether it is reentrant."""
    torch.manual_seed(1)
    model = ErnieMModel(ErnieMConfig(**CONFIG)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    return model


@contextmanager
def environment(**values: str):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(f"ERNIEM_FAST_{name}", value)
        yield


SETTINGS = {
    **{f"{op} by the reference": partial(use_implementations, **{op: "reference"}) for op in flags.OPS},
    "kernels off": partial(environment, KERNELS="off"),
    "all by the reference": partial(
        environment, **{flag.name.removeprefix(flags.PREFIX): "reference" for flag in flags.OPS.values()}
    ),
    "recomputed": partial(environment, RECOMPUTE="1"),
    "recomputed, kernels off": partial(environment, RECOMPUTE="1", KERNELS="off"),
    "verified": partial(environment, VERIFY="1"),
    "in the padded layout": partial(environment, PACKING="0"),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
KINDS = {"reentrant": True, "not reentrant": False}
every_kind = pytest.mark.parametrize("checkpointing", KINDS.values(), ids=KINDS)


def gradients(model: ErnieMModel, forward=nullcontext, backward=nullcontext, **batch) -> list[torch.Tensor]:
    """Of a seeded step whose forward and backward run inside the blocks that are given."""
    model.zero_grad()
    torch.manual_seed(2)
    with forward():
        output = model(**(batch or {"input_ids": IDS, "attention_mask": MASK}))
        loss = output.last_hidden_state.square().sum() + output.pooler_output.sum()
    with backward():
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_equal(found, expected) -> None:
    assert all(map(torch.equal, found, expected))


@every_kind
@every_setting
def test_flags_around_the_forward_alone(setting, checkpointing):
    model = model_of(checkpointing)
    with setting():
        expected = gradients(model)
    assert_equal(gradients(model, forward=setting), expected)


@every_kind
@every_setting
def test_flags_around_the_backward_alone(setting, checkpointing):
    model = model_of(checkpointing)
    expected = gradients(model)
    assert_equal(gradients(model, backward=setting), expected)


@pytest.mark.parametrize("op", flags.OPS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])  # silu is no op of ours
def test_recomputed_activations_follow_the_flags_of_the_forward(op, activation):
    model = model_of(None)
    with environment(RECOMPUTE="1"):
        with use_implementations(**{op: "reference"}):
            expected = gradients(model)
        assert_equal(gradients(model, forward=SETTINGS[f"{op} by the reference"]), expected)
        expected = gradients(model)
    assert_equal(gradients(model, forward=SETTINGS["recomputed"], backward=SETTINGS["kernels off"]), expected)


# ---- torch.compile


PACKED = {"input_ids": IDS.view(1, -1), "cu_seq_lens_q": torch.tensor([0, 8, 22]), "max_length_q": 14}
COMPILE = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("setting", [nullcontext, SETTINGS["recomputed"]], ids=["kept", "recomputed"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_one_graph_of_a_model_or_of_each_layer(whole, setting):
    """Inside a graph the flags are constants; a compiled layer in an eager model is given them all the same."""
    model = model_of(checkpointing=False)
    with setting():
        expected = gradients(model, **PACKED)
        for module in [model] if whole else model.encoder.layers:
            module.compile(**COMPILE)
        found = gradients(model, **PACKED)
    assert_equal(found, expected)
