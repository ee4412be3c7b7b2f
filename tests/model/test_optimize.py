"""`optimize` and `restore`: the whole model's numbers, what stays as it was, and what is refused."""

import copy
import gc
import io
import logging
import os
import pickle
import weakref
from unittest import mock

import peft
import pytest
import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertModel

import erniem_fast
from erniem_fast import ErnieMModel, post_ln, reference
from erniem_fast.inference import (
    LINEARS,
    InferenceModule,
    Int8Embedding,
    Int8Linear,
    OnednnBFloat16Linear,
    is_plain_inference,
    linear_kind,
)
from erniem_fast.matmul import fastest
from erniem_fast.matmul.libraries import NATIVE_BFLOAT16, NATIVE_PACKED, ONEDNN_BFLOAT16, ONEDNN_PACKED
from erniem_fast.native import packed as products
from tests.golden import cases
from tests.model.test_inference import LEVELS, SERVED, WIDTH
from tests.model.tiny import IDS, LAYOUT_CASES, MASK, REAL, assert_close, load, logits_of
from tests.one_calls import record
from tests.ops.problems import serving

INPUTS = {"input_ids": IDS, "attention_mask": MASK}
# The least cosine of a token's hidden state to the one in float32: seen 0.99992, and 0.9994 or with 7 bits 0.9979.
COSINES = {"packed": 1 - 1e-6, "bfloat16": 0.9995, "int8": 1 - 0.002 * WIDTH**2}

every_form = pytest.mark.parametrize(
    "weights",
    [
        pytest.param(name, marks=pytest.mark.skipif(not SERVED[name], reason=f"this machine has no {name} products"))
        for name in LINEARS
    ],
)


@pytest.fixture(autouse=True)
def packing_pays(monkeypatch):
    """As if the native product with packed weights were fastest here, which depends on the machine."""
    monkeypatch.setattr(fastest, "packing", lambda: NATIVE_PACKED)


def make(weights, model_class=ErnieMModel, keep=False, **options):
    return erniem_fast.optimize(load(model_class, **options), weights=weights, keep=keep)


@torch.inference_mode()
def hidden(model, **changes):
    return model(**{**INPUTS, **changes}).last_hidden_state


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == state[name].dtype


# --- Numbers ---------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("layout", ["1", "0"])
def test_it_is_near_float32(weights, layout, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", layout)
    exact, model = hidden(load()), make(weights)
    result = hidden(model)
    assert result.dtype == torch.float32
    assert torch.cosine_similarity(result[REAL], exact[REAL], dim=-1).min() > COSINES[weights]
    assert torch.equal(hidden(model), result)
    assert not any(type(module) is nn.Linear for module in model.encoder.modules())


@every_form
@pytest.mark.parametrize("case", LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_heads_and_pooler_stay_in_float32(weights, case):
    model_class, options = case
    inputs = (
        INPUTS if model_class is not erniem_fast.ErnieMForMultipleChoice else {n: i[None] for n, i in INPUTS.items()}
    )
    exact, model = load(model_class, **options), make(weights, model_class, **options)
    with torch.inference_mode():
        expected, result = logits_of(exact(**inputs)), logits_of(model(**inputs))
    for name in expected:
        # Hidden states are about 1 in size, and are off by up to 0.06 and 0.15 in bfloat16 and products.
        assert_close(result[name], expected[name], atol={"packed": 1e-5, "bfloat16": 0.2, "int8": 0.4 * WIDTH}[weights])
    changed = {name.split(".weight")[0] for name in model.state_dict() if name.endswith("weight_scale")}
    assert not any(name.startswith(("classifier", "linear", "qa", "ernie_m.pooler")) for name in changed)


# Whether attention beside int8 weights is in bfloat16.
NARROW = products.objection() is None and products.attention_dtype(torch.int8) == torch.bfloat16


class Oracle(nn.Module):
    """A linear in integers, as the reference computes it."""

    def __init__(self, linear):
        super().__init__()
        self.rounded, self.bias = reference.quantise_weight(linear.weight), linear.bias

    def forward(self, x):
        return reference.quantised_linear(x, *self.rounded, self.bias, LEVELS)


def test_int8_equals_the_oracle_in_every_layer(kernels, monkeypatch):
    """From given embeddings: the layers' bits are those of a model with the reference's linears."""
    monkeypatch.setattr(post_ln, "attends_in_bfloat16", lambda linears: NARROW)  # of the oracle too
    oracle = load().requires_grad_(False)
    for name, linear in list(oracle.encoder.named_modules()):
        if isinstance(linear, nn.Linear):
            oracle.encoder.set_submodule(name, Oracle(linear))
    embedded = torch.randn(*IDS.shape, oracle.config.hidden_size, generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": None, "inputs_embeds": embedded}
    # One rounding more or less before an input's rounding can move a value by a level: results of other kernels differ.
    assert_close(hidden(make("int8"), **inputs), hidden(oracle, **inputs), atol=1e-5)


@pytest.mark.skipif("native" not in serving("attention"), reason="PyTorch's attention depends on the batch")
@pytest.mark.parametrize("layout", ["1", "0"])
def test_int8_has_the_same_bits_alone_and_in_any_batch(layout, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", layout)
    model = make("int8")
    together = hidden(model)
    for row in range(len(IDS)):
        alone = hidden(model, input_ids=IDS[row : row + 1], attention_mask=MASK[row : row + 1])[0]
        assert torch.equal(alone[REAL[row]], together[row, REAL[row]])
    order = torch.tensor([4, 0, 2, 2, 1])
    assert torch.equal(
        hidden(model, input_ids=IDS[order], attention_mask=MASK[order])[REAL[order]], together[order][REAL[order]]
    )


native = pytest.mark.skipif(products.objection() is not None, reason="the native library cannot be built here")


@pytest.fixture
def calls(monkeypatch):
    """The token counts and the numbers of layers of native calls."""
    return record(monkeypatch)


@native
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_int8_layers_are_one_call_at_every_length(calls, tokens):
    """And gives the bits of its ops one by one, which a hook on a linear brings about."""
    ids = torch.randint(4, cases.VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    model = make("int8")
    whole = hidden(model, input_ids=ids, attention_mask=None)
    assert calls == [(tokens, model.config.num_hidden_layers)]
    hooks = [layer.linear1.register_forward_hook(lambda *_: None) for layer in model.encoder.layers]
    assert torch.equal(hidden(model, input_ids=ids, attention_mask=None), whole)
    assert len(calls) == 1
    for hook in hooks:
        hook.remove()
    with mock.patch.dict(os.environ, ERNIEM_FAST_VERIFY="1"):
        assert torch.equal(hidden(model, input_ids=ids, attention_mask=None), whole)
    assert len(calls) == 1


@native
def test_what_one_call_does_not_compute_goes_op_by_op(calls):
    model = make("int8", dropout=0.1)
    layer = model.encoder.layers[0]
    with torch.inference_mode():
        model(**INPUTS, output_attentions=True)
        model(**INPUTS, head_mask=torch.ones(2))
        model.train()(**INPUTS)
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()(**INPUTS)
    model(**INPUTS)  # autograd
    assert calls == []
    layer.linear2 = nn.Sequential(layer.linear2)
    hidden(model)
    assert len(calls) == model.config.num_hidden_layers - 1


@every_form
def test_hooks_adapters_and_probabilities_go_op_by_op_with_the_same_numbers(weights):
    model = make(weights)
    expected, seen = hidden(model), []
    probabilities = model(**INPUTS, output_attentions=True)
    # Other kernels may move a value by a unit in its last place, and so a rounded one by a level of its form.
    # With int8, attention may be in bfloat16.
    level = {"packed": 1e-5, "bfloat16": 0.1, "int8": 0.15 if NARROW else 0.05 * WIDTH}[weights]
    assert_close(probabilities.last_hidden_state, expected, level)
    assert len(probabilities.attentions) == model.config.num_hidden_layers
    linear = model.encoder.layers[0].linear1
    linear.register_forward_hook(lambda module, given, result: seen.append(result))
    assert not is_plain_inference(linear)
    assert_close(hidden(model), expected, level)
    assert seen[0].shape[1] == model.config.intermediate_size
    kept = seen[0].clone()
    hidden(model)
    assert torch.equal(seen[0], kept)  # no op writes into what a hook has


@every_form
def test_torch_compile_leaves_its_graph_for_the_products(weights):
    model = make(weights)
    expected = hidden(model)
    assert_close(hidden(torch.compile(model, backend="aot_eager")), expected)


@every_form
def test_an_export_is_refused(weights):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be exported.*restore"):
        torch.export.export(make(weights), (), dict(INPUTS))


# --- What is given up, saved and copied ------------------------------------------------------------------------------


@every_form
def test_the_float32_weights_are_given_up(weights):
    for keep in (False, True):
        model = load()
        names = ("encoder.layers.1.linear2", "encoder.layers.0.self_attn.self_attn.q_proj")
        given_up = [weakref.ref(model.get_submodule(name).weight) for name in names]
        erniem_fast.optimize(model, weights, keep=keep)
        gc.collect()
        kept = keep and weights != "packed"
        assert [each() is not None for each in given_up] == [kept] * len(names)


@every_form
def test_states(weights):
    """Plain tensors under the same keys; int8 has a scale beside each weight."""
    before, model = bits(load()), make(weights)
    state = model.state_dict()
    assert before.keys() == {name for name in state if not name.endswith(".weight_scale")}
    assert all(tensor.layout is torch.strided for tensor in state.values())
    replaced = [name for name, module in model.named_modules() if isinstance(module, InferenceModule)]
    assert len(replaced) == 6 * model.config.num_hidden_layers + (weights != "packed")
    for name in replaced:
        weight, original = state[f"{name}.weight"], before[f"{name}.weight"]
        if weights == "int8":
            expected, scale = reference.quantise_weight(original)
            assert torch.equal(weight, expected)
            assert torch.equal(state[f"{name}.weight_scale"], scale)
        else:
            assert torch.equal(weight, original.bfloat16() if weights == "bfloat16" else original)
    assert all(torch.equal(before[name], state[name]) for name in before if name.rpartition(".")[0] not in replaced)


def saved_and_loaded(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@every_form
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_copies_compute_the_same_and_can_be_restored(weights, keep, copied):
    original, model = bits(load()), make(weights, keep=keep)
    other = copied(model)
    assert torch.equal(hidden(other), hidden(model))
    assert_same_state(erniem_fast.restore(other), original)
    assert isinstance(model.encoder.layers[0].linear1, linear_kind(weights))


@every_form
def test_other_dtypes_and_devices_are_refused(weights):
    model = make(weights)
    expected = hidden(model)
    for change in (lambda: model.half(), lambda: model.bfloat16(), lambda: model.to("meta")):
        with pytest.raises((RuntimeError, ValueError)):
            change()
        assert torch.equal(hidden(model), expected)
    assert torch.equal(hidden(model.float().to("cpu")), expected)


# --- Training --------------------------------------------------------------------------------------------------------


@every_form
def test_training_is_refused_and_a_forward_in_eval_needs_no_mode(weights):
    model = make(weights, erniem_fast.ErnieMForSequenceClassification)
    batch = {**INPUTS, "labels": torch.zeros(len(IDS), dtype=torch.long)}
    model(**batch).loss.backward()  # the head alone is trained
    assert model.classifier.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in model.ernie_m.encoder.parameters())
    with pytest.raises(RuntimeError, match=r"cannot be trained.*restore"):
        model.train()(**batch)
    erniem_fast.restore(model)(**batch).loss.backward()
    assert model.ernie_m.encoder.layers[0].linear1.weight.grad.abs().sum() > 0


# --- Restoring -------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("keep", [True, False])
def test_restore_gives_the_very_bits(weights, keep):
    reference_model, model = load(), load()
    state, random = bits(model), torch.random.get_rng_state()
    modules = dict(model.named_modules())
    model.encoder.layers[1].linear1.bias.requires_grad_(False)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    erniem_fast.optimize(model, weights, keep=keep)
    assert not any(each.requires_grad for name, each in model.named_parameters() if not name.startswith("pooler"))
    assert erniem_fast.restore(model) is model
    assert_same_state(model, state)
    assert dict(model.named_modules()) == modules
    assert {name for name, each in model.named_parameters() if each.requires_grad} == trained
    assert torch.equal(torch.random.get_rng_state(), random)
    assert vars(model).keys() == vars(reference_model).keys()
    for other in ("int8", "packed"):
        assert_same_state(erniem_fast.restore(erniem_fast.optimize(model, other)), state)


@pytest.mark.parametrize("weights", ["int8", pytest.param("bfloat16", marks=every_form.args[1][1].marks)])
def test_weights_that_are_not_in_the_checkpoint_are_not_restored(weights, tmp_path):
    changed = load()
    with torch.no_grad():
        changed.encoder.layers[1].linear2.weight[0, 0] += 1e-3
    unknown, moved = load(), load()
    unknown.config._name_or_path = unknown.name_or_path = ""
    moved.config._name_or_path = moved.name_or_path = str(tmp_path / "nowhere")
    reasons = {"holds other weights": changed, "not loaded from a checkpoint": unknown, "cannot be read": moved}
    for reason, model in reasons.items():
        state = bits(model)
        before = hidden(erniem_fast.optimize(model, weights))
        with pytest.raises(ValueError, match=rf"{reason}.*keep=True"):
            erniem_fast.restore(model)
        assert torch.equal(hidden(model), before)
        del model
    assert_same_state(erniem_fast.restore(erniem_fast.optimize(load_from(state), weights, keep=True)), state)


def load_from(state):
    model = load()
    model.load_state_dict(state)
    return model


@every_form
@pytest.mark.parametrize("assign", [False, True])
def test_a_float32_state_is_loaded_in_the_form_of_the_weights(weights, assign):
    changed = {name: 1.1 * tensor for name, tensor in load().state_dict().items()}
    model, expected = make(weights), erniem_fast.optimize(load_from(changed), weights)
    hidden(model)
    model.load_state_dict(changed, assign=assign)
    assert_same_state(model, bits(expected))
    assert torch.equal(hidden(model), hidden(expected))


@every_form
@pytest.mark.parametrize("keep", [True, False])
def test_weights_that_were_loaded_since_are_not_mixed_with_the_original_ones(weights, keep):
    model = make(weights, keep=keep)
    changed = {name: 1.1 * tensor for name, tensor in load().state_dict().items()}
    model.load_state_dict(changed)
    if weights == "packed":  # which has the very bits
        assert_same_state(erniem_fast.restore(model), changed)
        return
    before = hidden(model)
    with pytest.raises(ValueError, match=r"embeddings\.word_embeddings others.*Load the model again"):
        erniem_fast.restore(copy.deepcopy(model))
    assert torch.equal(hidden(model), before)
    assert erniem_fast.verify(model)  # beside the rounded weights, because the original ones are of another model


def test_restore_leaves_other_models():
    model = load()
    state = bits(model)
    assert erniem_fast.restore(model) is model
    assert erniem_fast.restore(erniem_fast.optimize(model)) is model
    assert_same_state(model, state)


def test_a_module_that_was_replaced_since_is_not_thrown_away():
    model = make("int8")
    model.encoder.layers[0].linear1 = nn.Sequential(model.encoder.layers[0].linear1)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.linear1 was replaced since"):
        erniem_fast.restore(model)


@every_form
def test_head_and_encoder_are_one_model(weights):
    model = load(erniem_fast.ErnieMForQuestionAnswering)
    state = bits(model)
    erniem_fast.optimize(model.ernie_m, weights)
    with pytest.raises(ValueError, match=rf"has {weights} weights already"):
        erniem_fast.optimize(model, weights)
    assert_same_state(erniem_fast.restore(model), state)


# --- What is refused, and what stays ---------------------------------------------------------------------------------


def test_refusals(monkeypatch):
    tiny = DistilBertConfig(dim=8, n_layers=1, n_heads=1, hidden_dim=8, vocab_size=9)
    for other in (DistilBertModel(tiny), nn.Linear(3, 3), 3):
        for function in (erniem_fast.optimize, erniem_fast.restore):
            with pytest.raises(TypeError, match=type(other).__name__):
                function(other)
    with pytest.raises(ValueError, match=r"weights='int4' is unknown.*'packed', 'bfloat16', 'int8'"):
        erniem_fast.optimize(load(), "int4")
    for model, found in ((load().half(), "float16"), (load().to("meta"), "meta")):
        with pytest.raises(ValueError, match=rf"needs a model in float32 on the CPU.*{found}"):
            erniem_fast.optimize(model, "int8")
    monkeypatch.setattr(erniem_fast.modes, "multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=r"the CPU lacks AVX512_BF16 and AMX.*int8"):
        erniem_fast.optimize(load(), "bfloat16")


@every_form
def test_optimised_models_are_refused(weights):
    model = make(weights)
    state = bits(model)
    assert erniem_fast.optimize(model) is model  # which leaves the weights as they are
    assert_same_state(model, state)
    for other in LINEARS:
        with pytest.raises(ValueError, match=rf"has {weights} weights already.*restore"):
            erniem_fast.optimize(model, other)
    with pytest.raises(ValueError, match=rf"{weights} weights cannot be removed.*restore"):
        model.prune_heads({0: [1]})
    assert not model.config.pruned_heads


def test_none_leaves_the_weights():
    model, state = load(), bits(load())
    assert erniem_fast.optimize(model) is model
    assert_same_state(model, state)


def test_packing_that_does_not_pay_leaves_the_weights(caplog, monkeypatch):
    monkeypatch.setattr(fastest, "packing", lambda: None)
    model = erniem_fast.optimize(load(), "packed")
    assert type(model.encoder.layers[0].linear1) is nn.Linear
    assert "multiplies no faster by packed" in caplog.text
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


@every_form
def test_special_modules_stay_and_are_named_once(weights, caplog):
    model, seen = load().requires_grad_(False), []
    model.add_adapter(peft.LoraConfig(target_modules=["k_proj"]))
    layers = model.encoder.layers
    layers[0].linear1.register_forward_hook(lambda *_: seen.append(1))
    layers[0].linear2 = nn.Sequential(layers[0].linear2)
    layers[1].linear2.weight = layers[0].linear2[0].weight  # shared
    model.eval().requires_grad_(False)
    expected = hidden(model)
    with caplog.at_level(logging.WARNING, "erniem_fast"):
        erniem_fast.optimize(model, weights)
    (record,) = caplog.records
    names = ["0.linear1", "0.linear2", "1.linear2", *(f"{i}.self_attn.self_attn.k_proj" for i in range(len(layers)))]
    stay = {f"encoder.layers.{name}" for name in names}
    for name in stay:
        assert name in record.getMessage()
        assert not isinstance(model.get_submodule(name), InferenceModule)
    assert isinstance(layers[1].linear1, linear_kind(weights))
    assert torch.cosine_similarity(hidden(model)[REAL], expected[REAL], dim=-1).min() > COSINES[weights]
    assert len(seen) == 2
    erniem_fast.restore(model)
    assert torch.equal(hidden(model), expected) or weights == "packed"
    assert_close(hidden(model), expected)


def test_a_word_table_shared_with_a_head_stays(caplog):
    model = load(erniem_fast.ErnieMForTokenClassification)
    model.decoder = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.decoder.weight = model.ernie_m.embeddings.word_embeddings.weight
    erniem_fast.optimize(model, "int8")
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert "embeddings.word_embeddings" in caplog.text
    assert isinstance(model.ernie_m.encoder.layers[0].linear1, Int8Linear)


def test_pruned_heads_and_resized_tables():
    model = load()
    model.prune_heads({0: [1]})
    model.resize_token_embeddings(model.config.vocab_size + 3)
    expected, state = hidden(model), bits(model)
    erniem_fast.optimize(model, "int8", keep=True)
    assert torch.cosine_similarity(hidden(model)[REAL], expected[REAL], dim=-1).min() > COSINES["int8"]
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size
    assert_same_state(erniem_fast.restore(model), state)


@pytest.mark.parametrize(
    ("onednn", "native", "expected"),
    [
        (0.9, 1.5, ONEDNN_PACKED),
        (1.5, 0.9, NATIVE_PACKED),
        (0.9, 0.92, NATIVE_PACKED),
        (0.8, 0.92, ONEDNN_PACKED),
        (0.97, 0.96, NATIVE_PACKED),
        (0.99, 1.02, None),
        (1.5, 1.5, None),
    ],
)
def test_the_measurement_decides_whether_packing_pays(onednn, native, expected, monkeypatch):
    monkeypatch.undo()
    times = {"torch": 2.0, "native": 1.0, ONEDNN_PACKED: onednn, NATIVE_PACKED: native}
    both = mock.patch.object(fastest, "available_packed", return_value=(ONEDNN_PACKED, NATIVE_PACKED))
    with both, mock.patch.object(fastest, "_seconds", return_value=times):
        assert fastest.packing() == expected
    assert fastest.choice({**times, NATIVE_PACKED: 0.1}) == "native"
    with mock.patch.object(fastest, "available_packed", return_value=()):
        assert fastest.packing() is None


@pytest.mark.parametrize(
    ("onednn", "native", "expected"),
    [
        (0.9, 1.5, ONEDNN_BFLOAT16),
        (1.5, 0.9, NATIVE_BFLOAT16),
        (0.9, 0.92, NATIVE_BFLOAT16),
        (None, 9.0, NATIVE_BFLOAT16),
        (9.0, None, ONEDNN_BFLOAT16),
        (None, None, None),
    ],
)
def test_the_measurement_decides_who_multiplies_bfloat16(onednn, native, expected):
    times = {ONEDNN_BFLOAT16: onednn, NATIVE_BFLOAT16: native}
    times = {name: each for name, each in times.items() if each is not None}
    with mock.patch.object(fastest, "available_packed", return_value=tuple(times)):
        with mock.patch.object(fastest, "_seconds", return_value=times):
            assert fastest.bfloat16() == expected
        with mock.patch.object(fastest, "bfloat16", return_value=expected):
            assert (linear_kind("bfloat16") is OnednnBFloat16Linear) == (expected == ONEDNN_BFLOAT16)
