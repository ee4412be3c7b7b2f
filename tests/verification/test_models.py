"""`verify(model)`: what it lets pass, what it does not, and that it leaves a model as it is."""

import copy
import re
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import erniem_fast
from erniem_fast import ErnieMForSequenceClassification, __main__
from erniem_fast.batch import PaddingMask
from erniem_fast.families.layout import lay_out
from erniem_fast.families.packed import PackedEncoder
from erniem_fast.verification import models
from erniem_fast.verification.hard_batches import hard_batches
from tests.families.tiny import ATTENTION_MASK, FAMILIES, IDS, make
from tests.golden import cases
from tests.model.test_inference import WIDTH
from tests.model.tiny import load

BATCH = {"input_ids": IDS, "attention_mask": ATTENTION_MASK}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(models, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(models, "_LEAST_ROUNDS", 1)


@pytest.mark.parametrize(("family", "optimised"), [*((family, False) for family in FAMILIES), ("bert", True)])
def test_families(family, optimised):
    model = make(family)
    if optimised:
        erniem_fast.optimize(model)
    (found,) = erniem_fast.verify(model).models
    assert found.passed
    assert found.outputs.keys() == {"last_hidden_state", "pooler_output"}
    assert all(0 < each.error <= each.bound < 1e-4 for each in found.outputs.values())
    assert not found.fallbacks
    assert found.seconds > 0 < found.stock_seconds


@pytest.mark.parametrize(
    ("head", "outputs"),
    [
        ("ForSequenceClassification", {"pooler_output", "head: logits"}),
        ("ForMultipleChoice", {"pooler_output", "head: logits"}),
        ("ForQuestionAnswering", {"head: start_logits", "head: end_logits"}),
        ("ForMaskedLM", set()),
    ],
)
def test_heads(head, outputs):
    (found,) = erniem_fast.verify(make("bert", getattr(transformers, f"Bert{head}"))).models
    assert found.passed
    assert found.outputs.keys() == {"last_hidden_state", *outputs}
    assert found.name == ("BertModel" if head == "ForMaskedLM" else f"Bert{head}")


@pytest.mark.parametrize("model_class", [erniem_fast.ErnieMModel, ErnieMForSequenceClassification])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_ernie_m(model_class, weights):
    (found,) = erniem_fast.verify(erniem_fast.optimize(load(model_class), weights, keep=True)).models
    assert found.passed
    assert found.stock == "stock"
    assert found.outputs["pooler_output"].error < (1e-5 if weights is None else 0.05 * WIDTH)


@pytest.mark.parametrize(("keep", "stock"), [(True, "stock"), (False, "stock with the rounded weights")])
@pytest.mark.parametrize("optimised", ["bert", "ernie-m"])
def test_rounded_weights(keep, stock, optimised):
    model = make("bert") if optimised == "bert" else load()
    model.name_or_path = ""
    (found,) = erniem_fast.verify(erniem_fast.optimize(model, "int8", keep=keep)).models
    assert (found.weights, found.stock, found.passed) == ("int8", stock, True)
    assert 0.001 < found.outputs["last_hidden_state"].error < 0.05 * WIDTH
    assert "relative error" in str(found)


def test_several_models_in_an_object_that_is_no_module():
    class Holder:
        def __init__(self):
            self.one, self.other = make(), make("bert", transformers.BertForTokenClassification)

    found = erniem_fast.verify(Holder())
    assert [each.name for each in found.models] == ["XLMRobertaModel", "BertForTokenClassification"]
    assert found


@pytest.mark.parametrize("optimised", [False, True])
def test_a_batch(optimised):
    model = make(model_class=transformers.XLMRobertaForSequenceClassification)
    if optimised:
        erniem_fast.optimize(model)
    (found,) = erniem_fast.verify(model, {**BATCH, "labels": torch.tensor([0, 1, 1, 0, 1])}).models
    assert found.passed
    assert found.outputs.keys() == {"last_hidden_state", "head: logits"}


def test_what_falls_back_is_named():
    (found,) = erniem_fast.verify(make(attn_implementation="eager"), {**BATCH, "output_attentions": True}).models
    assert found.passed
    assert "output_attentions was given" in str(found)


# --- Failures --------------------------------------------------------------------------------------------------------


def test_small_errors_are_failures(monkeypatch):
    """One row that is too large by a thousandth fails, and is printed so."""
    compute = PackedEncoder.compute

    def wrong(self, hidden, batch, *arguments, **options):
        hidden, *rest = compute(self, hidden, batch, *arguments, **options)
        return hidden * (1 + 1e-3 * (batch.sequences.sequence_ids == 1)[:, None]), *rest

    monkeypatch.setattr(PackedEncoder, "compute", wrong)
    found = erniem_fast.verify(make())
    assert not found
    assert not found.models[0].outputs["last_hidden_state"].holds
    assert "XLMRobertaModel, float32 on cpu: FAILED" in str(found)


def test_padding_that_is_attended_to_is_a_failure(monkeypatch):
    def unmasked(model, input_ids, inputs_embeds, attention_mask, *rest):
        return lay_out(model, input_ids, inputs_embeds, None, *rest)

    monkeypatch.setattr("erniem_fast.families.packed.lay_out", unmasked)
    assert not erniem_fast.verify(make())


def test_positions_that_are_wrong_in_the_packed_layout_only_are_a_failure(monkeypatch):
    pack = PaddingMask.pack

    def shifted(self, **sizes):
        batch = pack(self, **sizes)
        return replace(batch, columns=batch.columns + 1)

    monkeypatch.setattr(PaddingMask, "pack", shifted)
    assert not erniem_fast.verify(load())


def test_wrong_int8_is_a_failure(monkeypatch):
    model = erniem_fast.optimize(make("bert"), "int8", keep=True)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight_scale.mul_(3)
    (found,) = erniem_fast.verify(model).models
    assert not found.passed


# --- The model stays -------------------------------------------------------------------------------------------------


def members(model):
    """What each module is and holds; its tensors as bytes."""
    tensors = {name: each.numpy().tobytes() for name, each in model.state_dict().items()}
    trained = [each.requires_grad for each in model.parameters()]
    return tensors, trained, [(type(module), module.training, vars(module).keys()) for module in model.modules()]


@pytest.mark.parametrize("weights", [False, None, "int8"])
def test_the_model_is_left_as_it_is(weights):
    model = nn.Sequential(make(dropout=0.5, model_class=transformers.XLMRobertaForTokenClassification))
    if weights is not False:
        erniem_fast.optimize(model, weights, keep=True)
    model.train()
    model[0].roberta.encoder.layer[1].eval()
    model[0].roberta.embeddings.word_embeddings.weight.requires_grad_(False)
    before, state = members(model), torch.get_rng_state()
    assert erniem_fast.verify(model)
    assert members(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_what_is_refused():
    with pytest.raises(TypeError, match="contains no model"):
        erniem_fast.verify(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="batch is of type list"):
        erniem_fast.verify(make(), ["a text"])
    with pytest.raises(ValueError, match="batch is packed"):
        erniem_fast.verify(make(), {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 11])})
    with pytest.raises(ValueError, match="position_ids that start anew"):
        erniem_fast.verify(make(), {"input_ids": IDS[:1, :5], "position_ids": torch.tensor([[0, 1, 0, 1, 2]])})


def test_hard_batches_are_hard():
    model = erniem_fast.optimize(make("bert", max_position_embeddings=40))
    batches = hard_batches(model)
    masks = [each["attention_mask"] for name, each in batches.items() if name != "no mask"]
    assert {tuple(mask.shape) for mask in masks} == {(6, 40), (1, 40), (6, 1)}
    assert any((mask[:, 0] == 0).any() for mask in masks)
    assert all(mask.any(1).all() for mask in masks)
    assert all((each["token_type_ids"] == 1).any() for each in batches.values())
    assert copy.deepcopy(model).longest_sequence == 40


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    make(model_class=transformers.XLMRobertaForSequenceClassification).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["erniem_fast", "verify", "--model", str(tmp_path)])
    assert __main__.main() == 0
    assert "XLMRobertaForSequenceClassification, float32 on cpu: passed" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["erniem_fast", "verify", "--model", str(cases.TINY), "--weights", "int8"])
    assert __main__.main() == 0
    assert "ErnieMModel, float32 on cpu, int8 weights: passed" in capsys.readouterr().out
    monkeypatch.setattr(PackedEncoder, "compute", lambda self, hidden, *_, **__: (hidden, [], []))
    monkeypatch.setattr("sys.argv", ["erniem_fast", "verify", "--model", str(tmp_path)])
    assert __main__.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["erniem_fast", "verify", "--model", str(tmp_path / "none")])
    assert __main__.main() == 1
    assert re.match(r"There is no folder '.*none', and no such model on the hub", capsys.readouterr().err)
    monkeypatch.setattr("sys.argv", ["erniem_fast", "verify", "--weights", "int8"])
    assert __main__.main() == 1
    assert "--weights int8 is a form of a model's weights; name the model by --model." in capsys.readouterr().err
