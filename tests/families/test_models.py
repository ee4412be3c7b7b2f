"""Bare models of transformers, optimised: the numbers and the gradients of transformers' own forward."""

import pytest
import torch

from erniem_fast import kernel_training, use_kernels
from erniem_fast.kernel_layers import KernelLayers
from tests.families.tiny import (
    ATTENTION_MASK,
    COLUMNS,
    EMBEDS,
    FAMILIES,
    GRADIENTS,
    IDS,
    REAL_TOKENS,
    TYPES,
    both,
    make,
)
from tests.model.tiny import assert_close, assert_same_gradients, gradients, random_weights, set_packing
from tests.one_calls import record

every_family = pytest.mark.parametrize("family", FAMILIES)

RIGHT = (torch.arange(COLUMNS) < torch.tensor([[11], [7], [4], [1], [9]])).long()

INPUTS = {
    "padding and holes": {"input_ids": IDS, "attention_mask": ATTENTION_MASK},
    "right": {"input_ids": IDS.where(RIGHT.bool(), 1), "attention_mask": RIGHT},
    "no mask": {"input_ids": IDS},
    "one row": {"input_ids": IDS[2:3], "attention_mask": ATTENTION_MASK[2:3]},
    "one token": {"input_ids": IDS[:1, :1]},
    "bools": {"input_ids": IDS, "attention_mask": REAL_TOKENS},
    "floats": {"input_ids": IDS, "attention_mask": ATTENTION_MASK.float()},
    "other numbers than 0 and 1": {"input_ids": IDS, "attention_mask": 2 * ATTENTION_MASK},
    "embeds": {"inputs_embeds": EMBEDS, "attention_mask": ATTENTION_MASK},
    "embeds, no mask": {"inputs_embeds": EMBEDS},
    "positions": {
        "input_ids": IDS,
        "attention_mask": ATTENTION_MASK,
        "position_ids": torch.arange(COLUMNS).flip(0)[None],
    },
    "a mask that hides tokens": {"input_ids": IDS.clamp(min=4), "attention_mask": ATTENTION_MASK},
}
every_input = pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)


def real_of(inputs):
    """What is compared: tokens that are attended to, and the first column."""
    given = inputs.get("input_ids", EMBEDS[..., 0])
    real = inputs.get("attention_mask", torch.ones(given.shape)).bool().clone()
    real[:, 0] = True
    return real


def assert_same(actual, expected, real):
    assert_close(actual.last_hidden_state[real], expected.last_hidden_state[real], atol=2e-5)
    assert not actual.last_hidden_state[~real].any()
    assert_close(actual.pooler_output, expected.pooler_output, atol=2e-5)


@pytest.fixture(autouse=True)
def packed_path(monkeypatch):
    """No test of this file is one of transformers' own forward."""
    monkeypatch.setattr("erniem_fast.families.fallback.tell", lambda model, why: pytest.fail(why))


@every_family
@every_input
def test_inference(family, inputs, kernels):
    stock, fast = both(family)
    with torch.inference_mode():
        assert_same(fast(**inputs), stock(**inputs), real_of(inputs))


@every_family
@every_input
def test_gradients(family, inputs):
    found, real = [], real_of(inputs)
    for model in both(family):
        output = model.train()(**inputs)
        states = output.last_hidden_state[real]
        loss = (states * random_weights(states)).sum() + (
            output.pooler_output * random_weights(output.pooler_output)
        ).sum()
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], rtol=GRADIENTS)


@pytest.mark.parametrize("inputs", [INPUTS["padding and holes"], INPUTS["embeds"]], ids=["ids", "embeds"])
def test_token_types(inputs):
    stock, fast = both("bert")
    typed = {**inputs, "token_type_ids": TYPES}
    found = []
    for model in (stock, fast):
        output = model(**typed)
        output.pooler_output.square().sum().backward()
        found.append((output, gradients(model)))
    (expected, expected_grads), (actual, grads) = found
    assert_same(actual, expected, real_of(inputs))
    assert_same_gradients(grads, expected_grads, rtol=GRADIENTS)
    assert (fast(**inputs).last_hidden_state - actual.last_hidden_state).abs().max() > 0.03


@every_family
def test_hidden_states_and_tuples(family):
    stock, fast = both(family)
    inputs = {**INPUTS["padding and holes"], "output_hidden_states": True}
    real = real_of(inputs)
    with torch.inference_mode():
        expected, actual, as_tuple = stock(**inputs), fast(**inputs), fast(**inputs, return_dict=False)
        assert len(fast(IDS, ATTENTION_MASK, return_dict=False)) == 2
        fast.config.output_hidden_states = True
        assert len(fast(IDS, ATTENTION_MASK).hidden_states) == 3
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    for result, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(result[real], wanted[real], atol=2e-5)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[2][1], actual.hidden_states[1])
    assert not isinstance(fast(**inputs, return_dict=None), tuple)


@pytest.mark.parametrize("indices", [[0, -1], [1], []])
def test_some_hidden_states(indices):
    stock, fast = both("bert")
    inputs = INPUTS["right"]
    with torch.inference_mode():
        found = [model(**inputs, output_hidden_states=indices).hidden_states or () for model in (stock, fast)]
    assert [each is None for each in found[1]] == [each is None for each in found[0]]
    for expected, actual in zip(*found, strict=True):
        if expected is not None:
            assert_close(actual[real_of(inputs)], expected[real_of(inputs)], atol=2e-5)


@every_family
def test_without_a_pooler(family):
    fast = both(family, model_class=lambda config: FAMILIES[family][0](config, add_pooling_layer=False))[1]
    assert fast(**INPUTS["right"]).pooler_output is None


def test_the_padded_layout_has_the_numbers_at_padding_too(monkeypatch):
    set_packing(monkeypatch, packed=False)
    stock, fast = both()
    inputs = INPUTS["padding and holes"]
    assert_close(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state, atol=2e-5)


def test_a_row_without_tokens_is_zeros_but_for_its_first_column():
    _, fast = both()
    mask = ATTENTION_MASK.clone()
    mask[1] = 0
    states = fast(IDS, mask).last_hidden_state
    assert states.isfinite().all()
    assert not states[1, 1:].any()


def test_padding_is_not_computed(monkeypatch):
    """The number of tokens in the first product is that of real ones, and of first columns."""
    _, fast = both()
    seen = []
    fast.encoder.layer[0].intermediate.dense.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[0]))
    with torch.inference_mode():
        fast(IDS, ATTENTION_MASK)
    assert seen == [real_of(INPUTS["padding and holes"]).sum()]


def with_seed(model, seed):
    torch.manual_seed(seed)
    return model(IDS, ATTENTION_MASK).last_hidden_state


@pytest.mark.parametrize(
    "name", ["embeddings.dropout", "attention.self.dropout", "attention.output.dropout", ".output.dropout"]
)
def test_each_dropout(name):
    """Its results have the mean and the variance of transformers', over the seeds."""
    moments = []
    for model in both("bert"):
        for path, module in model.named_modules():
            if (
                isinstance(module, torch.nn.Dropout)
                and path.endswith(name)
                and ("attention" in path) == ("att" in name)
            ):
                module.p = 0.3
        samples = torch.stack([with_seed(model.train(), seed).detach()[REAL_TOKENS] for seed in range(150)])
        moments.append((samples.mean(0), samples.std(0)))
        assert torch.equal(with_seed(model, 3)[REAL_TOKENS], samples[3])
    (expected, spread), (mean, std) = moments
    assert spread.mean() > 0.05
    # Two means of 150 samples are 0.09 standard deviations apart on average.
    assert ((mean - expected).abs() / spread.clamp(min=0.01)).mean() < 0.13
    assert 0.9 < std.mean() / spread.mean() < 1.1


def test_the_gradient_is_that_of_the_same_dropout():
    _, fast = both(dropout=0.3)
    fast.train().double()
    states = with_seed(fast, 1)
    assert (with_seed(fast, 2) - states).abs().max() > 0.1
    direction, weight = random_weights(states), fast.encoder.layer[0].output.dense.weight
    (states * direction).sum().backward()
    move = random_weights(weight) * 1e-5
    with torch.no_grad():
        weight += move
        above = (with_seed(fast, 1) * direction).sum()
        weight -= 2 * move
        below = (with_seed(fast, 1) * direction).sum()
    torch.testing.assert_close((weight.grad * move).sum(), (above - below) / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    stock, fast = both()
    inputs = INPUTS["right"]
    exact = stock.double()(**inputs).last_hidden_state[RIGHT.bool()]
    stock.to(dtype)
    fast.to(dtype)
    with torch.inference_mode():
        errors = [
            (model(**inputs).last_hidden_state[RIGHT.bool()].double() - exact).norm() / exact.norm()
            for model in (stock, fast)
        ]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("training", [False, True])
def test_layers_run_by_kernels_without_their_modules(training, monkeypatch):
    """As on a GPU, but in Triton's interpreter: in training each layer is one function of autograd."""
    runs = []
    owner, name = (kernel_training, "run") if training else (KernelLayers, "__call__")
    run = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: runs.append(1) or run(*arguments))
    inputs, found = INPUTS["padding and holes"], []
    with use_kernels(attention="triton", bias_gelu="triton", layernorm="triton"):
        for model in both("bert"):
            with torch.set_grad_enabled(training):
                output = model(**inputs)
            if training:
                output.pooler_output.square().sum().backward()
            found.append((output, gradients(model)))
    assert_same(found[1][0], found[0][0], real_of(inputs))
    if training:
        assert_same_gradients(found[1][1], found[0][1], rtol=GRADIENTS)
    assert len(runs) == (2 if training else 1)


def test_layers_of_few_tokens_are_one_call(monkeypatch):
    calls = record(monkeypatch)
    stock, fast = make(), both()[1]
    with torch.inference_mode():
        assert_same(fast(**INPUTS["one row"]), stock(**INPUTS["one row"]), real_of(INPUTS["one row"]))
    assert calls in ([], [(8 + 1, 2)])  # another library may be faster for so few tokens
