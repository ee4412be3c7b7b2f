"""The model family against what transformers 4.57.6 computed; golden/README.md says how."""

import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import erniem_fast
from tests.golden import cases

pytestmark = pytest.mark.usefixtures("kernels")

MODEL = np.load(cases.GOLDEN / "model.npz")
HEADS = np.load(cases.GOLDEN / "heads.npz")
INTERFACE = json.loads((cases.GOLDEN / "interface.json").read_text(encoding="utf-8"))
AUTO_CLASSES = {
    "model": transformers.AutoModel,
    "single_label": transformers.AutoModelForSequenceClassification,
    "multiple_choice": transformers.AutoModelForMultipleChoice,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
}

# Rounding alone: 4.57.6 in float32 is off these goldens by up to 2.3e-6 in hidden states, 3.2e-6 in logits and 3.8e-6
# of a gradient's largest value.
ATOL = 1e-5
GRADIENT_RTOL = 1e-5


def assert_close(actual, golden):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(golden), rtol=0, atol=ATOL)


def compared_positions(kind, packed):
    """(ROWS, LENGTH) bool: the real tokens, and in the padded layout padding too, but for the row without any token."""
    if packed:
        return cases.MASKS[kind] == 1
    return compared_rows(kind)[:, None].expand(-1, cases.LENGTH)


def compared_rows(kind):
    return cases.MASKS[kind].any(1)


@pytest.fixture
def model():
    return erniem_fast.ErnieMModel.from_pretrained(cases.TINY)


@pytest.mark.parametrize("kind", cases.MASKS)
def test_hidden_states(kind, packed, model):
    where = compared_positions(kind, packed)
    inputs = cases.make_inputs("model", kind)
    golden = torch.from_numpy(MODEL[f"{kind}/hidden_states"])

    outputs = model(**inputs, output_hidden_states=True)
    hidden_states = torch.stack(outputs.hidden_states)
    assert_close(hidden_states[:, where], golden[:, where])
    assert torch.equal(outputs.last_hidden_state, hidden_states[-1])
    assert hidden_states.isfinite().all()
    if packed:
        assert not hidden_states[:, ~where].any()

    with torch.inference_mode():
        assert_close(model(**inputs).last_hidden_state[where], golden[-1][where])


@pytest.mark.parametrize("kind", cases.MASKS)
def test_pooler_output(kind, packed, model):
    """It is column 0's, which left padding and holes mask but which attends to the real tokens nevertheless."""
    rows = compared_rows(kind)
    pooler_output = model(**cases.make_inputs("model", kind)).pooler_output
    assert_close(pooler_output[rows], MODEL[f"{kind}/pooler_output"][rows])
    assert pooler_output.isfinite().all()


@pytest.mark.parametrize("kind", cases.MASKS)
def test_attentions(kind, packed, model):
    where = compared_positions(kind, packed)
    outputs = model(**cases.make_inputs("model", kind), output_attentions=True)
    # (layers, rows, queries, heads, keys), so that `where` picks queries
    attentions = torch.stack(outputs.attentions).transpose(2, 3)
    golden = torch.from_numpy(MODEL[f"{kind}/attentions"]).transpose(2, 3)
    assert_close(attentions[:, where], golden[:, where])
    assert_close(outputs.last_hidden_state[where], MODEL[f"{kind}/hidden_states"][-1][where])
    if packed:
        assert not attentions[:, ~where].any()
    assert not attentions[:, ~compared_rows(kind)].any(), "a row without tokens attends to something"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float64])
def test_masks_of_any_dtype(dtype, packed, model):
    mask = cases.MASKS["holes"]
    where = compared_positions("holes", packed)
    outputs = model(cases.make_input_ids("holes"), attention_mask=mask.to(dtype))
    assert_close(outputs.last_hidden_state[where], MODEL["holes/hidden_states"][-1][where])


@pytest.mark.parametrize("kind", ["right", "left"])
def test_no_mask_means_that_pad_ids_are_padding(kind, packed, model):
    where = compared_positions(kind, packed)
    outputs = model(cases.make_input_ids(kind))
    assert_close(outputs.last_hidden_state[where], MODEL[f"{kind}/hidden_states"][-1][where])
    assert_close(outputs.pooler_output, MODEL[f"{kind}/pooler_output"])


@pytest.mark.parametrize("case", [*cases.make_rare_inputs(), "prune_heads"])
def test_rare_inputs(case, packed, model):
    inputs = (cases.make_rare_inputs() | {"prune_heads": {"input_ids": cases.make_input_ids("right")}})[case]
    if case == "prune_heads":
        model.prune_heads({0: [1], 1: [0]})
    where = compared_positions("right", packed)
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    for output_attentions in (False, True):
        outputs = model(**given, attention_mask=cases.MASKS["right"], output_attentions=output_attentions)
        assert_close(outputs.last_hidden_state[where], MODEL[f"{case}/last_hidden_state"][where])
    if "head" in case:
        golden = torch.from_numpy(MODEL[f"{case}/attentions"]).transpose(2, 3)
        assert_close(torch.stack(outputs.attentions).transpose(2, 3)[:, where], golden[:, where])
    assert all(torch.equal(given[name], tensor) for name, tensor in inputs.items()), "forward changed its arguments"


def golden_loss_name(head, kind, packed):
    """Span heads take their loss over real tokens where padding is not computed; None where there is no golden."""
    if packed and head in cases.SPAN_HEADS:
        return "real_loss"
    return "loss" if cases.has_golden_loss(head, kind) else None


@pytest.mark.parametrize("kind", cases.MASKS)
@pytest.mark.parametrize("head", cases.HEADS)
def test_logits_and_loss(head, kind, packed):
    model = cases.load(erniem_fast, *cases.HEADS[head])
    outputs = model(**cases.make_inputs(head, kind), **cases.make_labels(head, kind))

    for name in (name for name in outputs if name.endswith("logits")):
        logits, golden = outputs[name].detach(), torch.from_numpy(HEADS[f"{head}/{kind}/{name}"])
        assert logits.shape == golden.shape
        assert logits.isfinite().all()
        if head in (*cases.SPAN_HEADS, "token_classification"):
            where = compared_positions(kind, packed)
            assert_close(logits[where], golden[where])
            if packed and head in cases.SPAN_HEADS:
                assert (logits[~where] == torch.finfo(logits.dtype).min).all()
        else:
            rows = compared_rows(kind)
            assert_close(logits.reshape(cases.ROWS, -1)[rows], golden.reshape(cases.ROWS, -1)[rows])

    assert outputs.loss.isfinite()
    if loss_name := golden_loss_name(head, kind, packed):
        assert_close(outputs.loss, HEADS[f"{head}/{kind}/{loss_name}"])


@pytest.mark.parametrize("kind", cases.MASKS)
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("route", ["kernels", "attentions", "embeddings", "checkpointing"])
def test_gradients(route, head, kind, packed):
    """By every route that a backward can take: each must give the same."""
    model = cases.load(erniem_fast, *cases.HEADS[head]).train()
    inputs = cases.make_inputs(head, kind)
    if route == "embeddings":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    if route == "checkpointing":
        model.gradient_checkpointing_enable()
    labels = cases.make_labels(head, kind)
    model(**inputs, **labels, output_attentions=route == "attentions").loss.backward()
    sketches = cases.sketch_gradients(model)
    assert all(np.isfinite(sketch).all() for sketch in sketches.values())

    loss_name = golden_loss_name(head, kind, packed)
    if loss_name is None:
        return
    golden = HEADS[f"{head}/{kind}/{loss_name}_gradients"]
    sizes = [sketch.size for sketch in sketches.values()]
    assert sum(sizes) == golden.size, f"gradients reach other parameters than in transformers: {list(sketches)}"
    for (name, sketch), expected in zip(sketches.items(), np.split(golden, np.cumsum(sizes)[:-1]), strict=True):
        # A gradient that cancels to zero, such as a key bias's, is measured by the largest of the model.
        scale = np.abs(expected).max() or np.abs(golden).max()
        error = np.abs(sketch - expected).max() / scale
        assert error <= GRADIENT_RTOL, f"gradient of {name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("head", INTERFACE)
def test_arguments_and_parameters(head):
    model = cases.load(erniem_fast, *cases.MODELS[head])
    arguments = list(inspect.signature(model.forward).parameters)
    golden = INTERFACE[head]
    assert arguments[: len(golden["forward"])] == golden["forward"]
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == golden["parameters"]


@pytest.mark.parametrize("head", INTERFACE)
def test_keys_and_tuples(head, packed):
    """What an output holds, in which order: with and without labels, hidden states and attentions."""
    model = cases.load(erniem_fast, *cases.MODELS[head])
    for golden in INTERFACE[head]["outputs"]:
        inputs = cases.make_inputs(head, "right")
        if golden["labelled"] and head in cases.HEADS:
            inputs |= cases.make_labels(head, "right")
        inputs |= {"output_hidden_states": golden["hidden_states"], "output_attentions": golden["attentions"]}
        assert list(model(**inputs)) == golden["keys"]
        if golden["tuple"] is not None:
            assert cases.describe(model(**inputs, return_dict=False)) == golden["tuple"]


def test_a_model_without_pooler():
    model = erniem_fast.ErnieMModel.from_pretrained(cases.TINY, add_pooling_layer=False)
    outputs = model(**cases.make_inputs("model", "full"))
    assert outputs.pooler_output is None
    assert_close(outputs.last_hidden_state, MODEL["full/hidden_states"][-1])


@pytest.mark.parametrize("load", [erniem_fast.ErnieMModel.from_pretrained, transformers.AutoModel.from_pretrained])
def test_a_checkpoint_of_transformers_4_loads_whole(load):
    model, info = load(cases.TINY, output_loading_info=True)
    assert isinstance(model, erniem_fast.ErnieMModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    saved = load_file(cases.TINY / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


@pytest.mark.parametrize("head", AUTO_CLASSES)
def test_auto_classes_know_the_family(head):
    model = AUTO_CLASSES[head].from_pretrained(cases.TINY)
    assert type(model) is getattr(erniem_fast, cases.MODELS[head][0])
    assert type(transformers.AutoConfig.from_pretrained(cases.TINY)) is erniem_fast.ErnieMConfig


@pytest.mark.parametrize("head", cases.HEADS)
def test_save_pretrained_round_trip(head, tmp_path):
    model = cases.load(erniem_fast, *cases.HEADS[head])
    model.save_pretrained(tmp_path / "first")
    again, info = type(model).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)

    again.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_bin_checkpoint_loads(tmp_path):
    state = load_file(cases.TINY / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((cases.TINY / "config.json").read_bytes())
    model, info = erniem_fast.ErnieMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
