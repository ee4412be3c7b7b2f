"""Forms of weights: what is near float32, what comes back, and what is refused."""

import copy
import logging
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, XLMRobertaForSequenceClassification, XLMRobertaModel

import erniem_fast
from erniem_fast import families
from erniem_fast.inference import LINEARS, InferenceEmbedding, InferenceModule, linear_kind
from tests.families.tiny import ATTENTION_MASK, FAMILIES, IDS, REAL_TOKENS, make
from tests.golden.cases import TINY
from tests.model.test_inference import WIDTH
from tests.model.test_optimize import COSINES, assert_same_state, bits, every_form, packing_pays
from tests.model.tiny import assert_close

__all__ = ["packing_pays"]  # a fixture

INPUTS = {"input_ids": IDS, "attention_mask": ATTENTION_MASK}


@torch.inference_mode()
def states(model, **changes):
    return model(**INPUTS, **changes).last_hidden_state


@every_form
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_near_float32(family, weights):
    """Rounding errors of these weights are larger than trained ones', and so are the bounds."""
    model = make(family)
    exact = states(model)
    erniem_fast.optimize(model, weights)
    result = states(model)
    assert torch.cosine_similarity(result[REAL_TOKENS], exact[REAL_TOKENS], dim=-1).min() > 3 * COSINES[weights] - 2
    assert not any(type(module) is nn.Linear for module in model.encoder.modules())
    assert isinstance(model.embeddings.word_embeddings, InferenceEmbedding) == (weights != "packed")
    assert isinstance(model.encoder.layer[1].output.dense, linear_kind(weights))


@every_form
@pytest.mark.parametrize("keep", [True, False])
def test_restore_gives_the_very_bits(weights, keep, tmp_path):
    """Read again from the checkpoint of a head, unless they are kept."""
    make(model_class=XLMRobertaForSequenceClassification).save_pretrained(tmp_path)
    model = XLMRobertaForSequenceClassification.from_pretrained(tmp_path).eval()
    state, names = bits(model), vars(model).keys() | vars(model.roberta).keys()
    erniem_fast.optimize(model, weights, keep=keep)
    assert not any(each.requires_grad for each in model.roberta.parameters())
    erniem_fast.restore(copy.deepcopy(model))
    assert erniem_fast.restore(model) is model
    assert_same_state(model, state)
    assert vars(model).keys() | vars(model.roberta).keys() == names
    assert type(model.roberta) is XLMRobertaModel
    assert all(each.requires_grad for each in model.parameters())


def test_lost_weights_are_told():
    model = erniem_fast.optimize(make(), "int8")
    with pytest.raises(ValueError, match="keep=True"):
        erniem_fast.restore(model)
    assert isinstance(model.encoder.layer[0].output.dense, InferenceModule)


@every_form
def test_saving(weights, tmp_path):
    """Rounded weights are not saved, because transformers would take them for the original ones."""
    for model_class in (XLMRobertaModel, XLMRobertaForSequenceClassification):
        stock, model = make(model_class=model_class), make(model_class=model_class)
        holder = nn.Sequential(model)
        erniem_fast.optimize(holder, weights, keep=True)
        if weights == "packed":
            model.save_pretrained(tmp_path / model_class.__name__)
        else:
            for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                with pytest.raises(RuntimeError, match=rf"with {weights} weights cannot be saved.*restore"):
                    each.save_pretrained(tmp_path)
            erniem_fast.restore(holder)
            model.save_pretrained(tmp_path / model_class.__name__)
        assert_same_state(model_class.from_pretrained(tmp_path / model_class.__name__), bits(stock))


@every_form
def test_what_falls_back_computes_with_these_weights_too(weights, caplog):
    with caplog.at_level(logging.WARNING, "erniem_fast"):
        model = erniem_fast.optimize(make(attn_implementation="eager"), weights)
        # A value on the edge between two levels may go to the other one.
        torch.testing.assert_close(
            states(model, output_attentions=True)[REAL_TOKENS], states(model)[REAL_TOKENS], rtol=0, atol=0.1 * WIDTH
        )
    assert "output_attentions" in caplog.text


@every_form
def test_a_change_of_dtype_is_refused_before_a_tensor_has_changed(weights):
    model = erniem_fast.optimize(make(), weights)
    with pytest.raises(RuntimeError, match=rf"{weights} weights stays in float32"):
        model.half()
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_a_word_table_that_a_head_shares_stays(caplog):
    model = erniem_fast.optimize(make("bert", model_class=BertForMaskedLM), "int8", keep=True)
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
    assert "embeddings.word_embeddings" in caplog.text
    assert isinstance(model.bert.encoder.layer[0].output.dense, LINEARS["int8"])


def test_several_encoders():
    both = nn.ModuleList([make("bert"), make()])
    erniem_fast.optimize(both, "int8", keep=True)
    assert all(isinstance(model.encoder.layer[0].output.dense, LINEARS["int8"]) for model in both)
    with pytest.raises(ValueError, match="has int8 weights already"):
        erniem_fast.optimize(both, "int8")
    before = states(both[0])
    both.append(make())
    erniem_fast.optimize(both)
    assert families.is_packed(both[2])
    assert torch.equal(states(both[0]), before)


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_an_encoder_that_an_object_holds_twice(weights, packing_pays):
    """As a router of sentence-transformers does, or an object that keeps a model and its encoder."""
    holder = SimpleNamespace(model=make(model_class=XLMRobertaForSequenceClassification))
    holder.encoder = holder.model.base_model
    before = copy.deepcopy(holder.encoder.state_dict())
    erniem_fast.optimize(holder, weights, keep=True)
    if weights == "int8":
        linears = [each for each in holder.encoder.encoder.modules() if isinstance(each, LINEARS["int8"])]
        assert len(linears) == 12
    erniem_fast.restore(holder)
    after = holder.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "load", [make, lambda: erniem_fast.ErnieMForSequenceClassification.from_pretrained(TINY)], ids=["xlm-r", "ernie-m"]
)
def test_a_table_of_rounded_rows_is_not_resized(load):
    model = load().eval()
    words = model.config.vocab_size
    erniem_fast.optimize(model, "int8", keep=True)
    for size, options in ((words + 3, {}), (None, {"pad_to_multiple_of": words + 3})):
        with pytest.raises(ValueError, match=r"The word table has int8 weights.*erniem_fast\.restore"):
            model.resize_token_embeddings(size, **options)
    model.resize_token_embeddings(words)  # nothing changes
    assert model.config.vocab_size == words
    erniem_fast.restore(model).resize_token_embeddings(words + 3)
    assert model.get_input_embeddings().weight.shape[0] == words + 3


def test_layers_that_are_the_same_module():
    model = make()
    model.encoder.layer[1] = model.encoder.layer[0]
    before = states(erniem_fast.optimize(model))
    erniem_fast.optimize(model, "int8", keep=True)
    assert isinstance(model.encoder.layer[1].output.dense, LINEARS["int8"])
    assert_close(states(model)[REAL_TOKENS], before[REAL_TOKENS], atol=0.1 * WIDTH)
    assert torch.equal(states(erniem_fast.optimize(erniem_fast.restore(model))), before)


def test_a_linear_that_two_layers_share_stays(caplog):
    model = make()
    model.encoder.layer[1].output.dense = model.encoder.layer[0].output.dense
    erniem_fast.optimize(model, "int8", keep=True)
    assert type(model.encoder.layer[0].output.dense) is type(model.encoder.layer[1].output.dense) is nn.Linear
    assert "encoder.layer.0.output.dense" in caplog.text


def test_training_is_refused():
    model = erniem_fast.optimize(make(), "int8")
    with pytest.raises(RuntimeError, match=r"cannot be trained.*restore"):
        model.train()(**INPUTS)


def test_a_head_around_the_encoder_that_was_passed_is_not_saved(tmp_path):
    model = make("bert", BertForMaskedLM)
    erniem_fast.optimize(model.bert, "int8", keep=True)
    for each in (model, model.bert, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="int8 weights cannot be saved"):
            each.save_pretrained(tmp_path)
    assert model.state_dict()
    erniem_fast.restore(model.bert)
    model.save_pretrained(tmp_path)
    assert_same_state(BertForMaskedLM.from_pretrained(tmp_path), bits(make("bert", BertForMaskedLM)))


def test_adapters_on_rounded_weights_are_saved(tmp_path):
    model = make()
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    erniem_fast.optimize(model, "int8", keep=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


@every_form
def test_a_packed_weight_refuses_to_be_written(weights):
    """A change of the copy would be lost."""
    linear = erniem_fast.optimize(make(), weights).encoder.layer[0].output.dense
    if linear.__dict__.get("packed") is None:
        pytest.skip("no product here takes packed weights")
    before = linear.weight.clone()
    for write in (lambda: linear.weight.zero_(), lambda: linear.weight[0].fill_(1), lambda: linear.weight.data.add_(1)):
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match=r"Inplace update to inference tensor|would be lost; clone"),
        ):
            write()
    for value in (torch.zeros_like(before), nn.Parameter(before.float())):
        with pytest.raises(AttributeError, match=r"is packed and cannot be replaced; call erniem_fast\.restore"):
            linear.weight = value
    assert torch.equal(linear.weight, before)
    assert type(2 * linear.weight) is torch.Tensor
    assert "ReadOnly" in repr(linear.weight)


@pytest.mark.parametrize("pays", [None, "oneDNN, packed"])
def test_packed_weights_are_for_inference_on_every_machine(pays, monkeypatch):
    """Also where they stay as they are, because packed ones would be no faster."""
    monkeypatch.setattr("erniem_fast.matmul.fastest.packing", lambda: pays)
    model = erniem_fast.optimize(make(), "packed")
    assert not any(each.requires_grad for name, each in model.named_parameters() if not name.startswith("pooler."))
    with pytest.raises(RuntimeError, match=r"packed weights are for inference.*restore"):
        model.train()(**INPUTS)
    with pytest.raises(ValueError, match="has packed weights already"):
        erniem_fast.optimize(model, "int8")
    states(model.eval())
    erniem_fast.restore(model)
    model.train()(**INPUTS).pooler_output.sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    assert "frozen_as" not in vars(model.encoder)


def test_what_inference_mode_surrounds_can_be_trained_later():
    """The weights of pooler and heads beside packed ones, and all after `restore`."""
    model = make("bert", BertForMaskedLM)
    with torch.inference_mode():
        erniem_fast.optimize(model, "packed")
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.cls.train()(model(**INPUTS, output_hidden_states=True).hidden_states[-1]).sum().backward()
    with torch.inference_mode():
        erniem_fast.restore(model)
    model.train()(**INPUTS).logits.square().sum().backward()
    assert model.bert.encoder.layer[0].output.dense.weight.grad is not None


@every_form
def test_a_model_that_is_made_in_inference_mode(weights):
    with torch.inference_mode():
        model = erniem_fast.optimize(make("bert"), weights)
        assert torch.equal(states(model), states(erniem_fast.optimize(make("bert"), weights)))
    outside = erniem_fast.optimize(make("bert"), weights)
    torch.testing.assert_close(states(model), states(outside), rtol=0, atol=1e-5)
