"""int8 weights in `from_pretrained` and `save_pretrained`: the same as `optimize` makes, and plain in the file."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import erniem_fast
from erniem_fast import ErnieMForQuestionAnswering, ErnieMForTokenClassification, ErnieMInt8Config, ErnieMModel
from erniem_fast.inference import InferenceModule, Int8Embedding, Int8Linear
from erniem_fast.matmul import fastest
from erniem_fast.matmul.libraries import NATIVE_PACKED
from tests.golden import cases
from tests.model.test_optimize import COSINES, hidden
from tests.model.tiny import IDS, MASK, REAL, load

INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def load_int8(model_class=ErnieMModel, checkpoint=cases.TINY, **options):
    return model_class.from_pretrained(checkpoint, quantization_config=ErnieMInt8Config(**options)).eval()


@pytest.fixture(scope="module")
def expected():
    """The state and the hidden states that `optimize` gives."""
    model = erniem_fast.optimize(load(), "int8")
    return model.state_dict(), hidden(model)


@pytest.fixture
def saved(tmp_path):
    erniem_fast.optimize(load(), "int8").save_pretrained(tmp_path)
    return tmp_path


def assert_same(model, expected):
    state, states = expected
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    assert torch.equal(hidden(model), states)


def test_loading_rounds_as_optimize_does(expected):
    model = load_int8()
    assert_same(model, expected)
    assert not any(each.requires_grad for each in model.encoder.parameters())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(**INPUTS)


@pytest.mark.parametrize("load_again", [ErnieMModel.from_pretrained, AutoModel.from_pretrained, load_int8])
def test_a_saved_model_loads_again(saved, expected, load_again, tmp_path):
    if load_again is load_int8:
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            model = load_int8(checkpoint=saved)
    else:
        model = load_again(saved).eval()
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "again")
    assert_same(ErnieMModel.from_pretrained(tmp_path / "again").eval(), expected)


def test_the_file_holds_plain_integers_and_scales(saved, expected):
    state = load_file(saved / "model.safetensors")
    assert state.keys() == expected[0].keys()
    name = "encoder.layers.1.linear2"
    assert state[f"{name}.weight"].dtype == torch.int8
    assert state[f"{name}.weight"].shape == (cases.HIDDEN, 96)
    assert state[f"{name}.weight_scale"].dtype == torch.float32
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "erniem_int8", "modules_to_not_convert": []}
    assert config["dtype"] == "float32"


def test_heads_lend_their_encoder_and_take_one(saved, tmp_path, expected):
    head = load_int8(ErnieMForTokenClassification)
    assert torch.equal(hidden(head.ernie_m), expected[1])
    head.save_pretrained(tmp_path / "head")
    again = ErnieMForTokenClassification.from_pretrained(tmp_path / "head").eval()
    with torch.inference_mode():
        assert torch.equal(again(**INPUTS).logits, head(**INPUTS).logits)
    assert torch.equal(hidden(ErnieMModel.from_pretrained(tmp_path / "head").eval()), expected[1])
    assert torch.equal(hidden(ErnieMForQuestionAnswering.from_pretrained(saved).eval().ernie_m), expected[1])


@pytest.mark.parametrize("names", [["encoder.layers.1"], ["linear2"], ["word_embeddings", "encoder.layers.0.linear1"]])
def test_named_modules_stay_in_float32(names, tmp_path):
    exact, model = load(), load_int8(modules_to_not_convert=names)
    kept = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and not name.startswith(("pooler", "embeddings.position"))
    ]
    candidates = [name for name, module in model.named_modules() if isinstance(module, (Int8Linear, Int8Embedding))]
    assert len(kept) + len(candidates) == 13
    assert sorted(kept) == sorted(
        name
        for name in (*kept, *candidates)
        if any(name.startswith(f"{each}.") or name.endswith(each) for each in names)
    )
    state = exact.state_dict()
    assert all(torch.equal(model.state_dict()[f"{name}.weight"], state[f"{name}.weight"]) for name in kept)
    assert torch.cosine_similarity(hidden(model)[REAL], hidden(exact)[REAL], dim=-1).min() > COSINES["int8"]
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path).eval()
    assert torch.equal(hidden(again), hidden(model))
    assert sorted(again.config.quantization_config.modules_to_not_convert) == sorted(kept)


def test_pruned_heads_are_saved(tmp_path):
    model = load()
    model.prune_heads({0: [1]})
    erniem_fast.optimize(model, "int8").save_pretrained(tmp_path)
    assert torch.equal(hidden(ErnieMModel.from_pretrained(tmp_path).eval()), hidden(model))


@pytest.mark.parametrize("weights", ["packed", "bfloat16"])
def test_other_forms_are_saved_as_plain_weights(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, "packing", lambda: NATIVE_PACKED)
    exact = load()
    try:
        model = erniem_fast.optimize(load(), weights)
    except ValueError as error:
        pytest.skip(str(error))
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    rounded = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, InferenceModule)}
    assert len(rounded) == 12 + (weights == "bfloat16")
    for name, each in again.state_dict().items():
        original = exact.state_dict()[name]
        narrow = weights == "bfloat16" and name in rounded
        assert torch.equal(each, original.bfloat16().float() if narrow else original)


def test_what_is_saved_is_what_the_model_holds(saved, tmp_path):
    model = load()
    erniem_fast.optimize(model, "int8").save_pretrained(tmp_path / "int8")
    erniem_fast.restore(model).save_pretrained(tmp_path / "restored")
    again = ErnieMModel.from_pretrained(tmp_path / "restored")
    assert type(again.encoder.layers[0].linear1) is nn.Linear
    assert all(torch.equal(each, load().state_dict()[name]) for name, each in again.state_dict().items())


def test_refusals(saved):
    with pytest.raises(ValueError, match=r"device_map names meta.*CPU"):
        ErnieMModel.from_pretrained(cases.TINY, quantization_config=ErnieMInt8Config(), device_map="meta")
    with pytest.raises(ValueError, match=r"modules_to_not_convert names 'linear3'.*linear2"):
        load_int8(modules_to_not_convert=["linear3"])
    with pytest.raises(TypeError, match="is a string; pass a list"):
        ErnieMInt8Config(modules_to_not_convert="linear2")
    with pytest.raises(TypeError, match="load_in_4bit"):
        ErnieMInt8Config(load_in_4bit=True)
    with pytest.raises(ValueError, match="was loaded with int8 weights"):
        erniem_fast.restore(ErnieMModel.from_pretrained(saved))
    with pytest.raises(ValueError, match="has int8 weights already"):
        erniem_fast.optimize(ErnieMModel.from_pretrained(saved), "int8")


def test_it_is_for_this_architecture(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"for ERNIE-M models, not for BertModel"):
        BertModel.from_pretrained(tmp_path, quantization_config=ErnieMInt8Config())
