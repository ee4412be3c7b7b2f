"""Heads, objects that contain encoders, copies and files; and the way back."""

import copy
import inspect
import io
import logging
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import BertModel, XLMRobertaModel
from transformers.models.bert import modeling_bert
from transformers.models.xlm_roberta import modeling_xlm_roberta
from transformers.utils.generic import find_labels

import erniem_fast
from tests.families.tiny import ATTENTION_MASK, FAMILIES, GRADIENTS, IDS, REAL_TOKENS, both, make
from tests.model.tiny import assert_close, assert_same_gradients, gradients

INPUTS = {"input_ids": IDS, "attention_mask": ATTENTION_MASK}
PREFIXES = {"xlm-roberta": "XLMRoberta", "roberta": "Roberta", "camembert": "Camembert", "bert": "Bert"}
LABELS = {
    "ForSequenceClassification": torch.tensor([0, 1, 1, 0, 1]),
    "ForTokenClassification": REAL_TOKENS.long().where(REAL_TOKENS, -100),
    "ForMaskedLM": IDS.where(REAL_TOKENS, -100),
    "ForMultipleChoice": torch.tensor([3]),
    "ForQuestionAnswering": None,
}


@pytest.fixture(autouse=True)
def silence(caplog):
    """No test of this file falls back."""
    with caplog.at_level(logging.WARNING, "erniem_fast"):
        yield
    assert not warnings(caplog)


def warnings(log):
    return [each.getMessage() for each in log.records if each.name.startswith("erniem_fast")]


def states(model, **changes):
    with torch.inference_mode():
        return model(**{**INPUTS, **changes}).last_hidden_state


def assert_packed(model):
    assert type(model).__module__.startswith("erniem_fast.families.")


@pytest.mark.parametrize("head", LABELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads(family, head):
    """Logits, loss and gradients; with padding on the left too, where heads read the first column."""
    inputs = {name: each[None] if head == "ForMultipleChoice" else each for name, each in INPUTS.items()}
    found = []
    for model in both(family, model_class=getattr(transformers, PREFIXES[family] + head)):
        if head == "ForQuestionAnswering":  # its loss is a softmax over all columns, and so over padding
            output = model(**inputs)
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
            loss = logits[REAL_TOKENS].square().mean()
        else:
            output = model(**inputs, labels=LABELS[head])
            logits, loss = output.logits, output.loss
        loss.backward()
        found.append((logits[REAL_TOKENS] if logits.shape[:2] == IDS.shape else logits, loss, gradients(model)))
    (expected, expected_loss, expected_grads), (actual, loss, grads) = found
    assert_close(actual, expected, atol=1e-4)
    assert_close(loss, expected_loss, atol=2e-5)
    assert_same_gradients(grads, expected_grads, rtol=1e-4)


@pytest.mark.parametrize("head", ["Model", *LABELS])
@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_stay(family, head):
    """Trainer leaves out of a batch whatever is not in the signature, and finds there what labels are called."""
    kind = getattr(transformers, f"{PREFIXES[family]}{head}")
    fast = type(erniem_fast.optimize(make(family, model_class=kind)))
    ours, theirs = (list(inspect.signature(each.forward).parameters) for each in (fast, kind))
    assert ours == theirs
    assert find_labels(fast) == find_labels(kind)


class Holder:
    """Not a module, as a pipeline is."""

    def __init__(self, model):
        self.model, self.name = model, "holder"


@pytest.mark.parametrize(
    "contain", [nn.Sequential, lambda model: nn.ModuleDict({"text": model}), Holder, nn.DataParallel]
)
def test_objects_that_contain_an_encoder(contain):
    model = make()
    expected, thing = states(model), contain(model)
    assert erniem_fast.optimize(thing) is thing
    assert_packed(model)
    assert_close(states(model)[REAL_TOKENS], expected[REAL_TOKENS], atol=2e-5)
    assert erniem_fast.restore(thing) is thing
    assert type(model) is XLMRobertaModel


def test_several_encoders_in_one_object():
    models = [make("bert"), make("xlm-roberta"), make("bert", num_hidden_layers=1)]
    erniem_fast.optimize(nn.ModuleList(models))
    for model in models:
        assert_packed(model)
    erniem_fast.optimize(nn.ModuleList(models))  # once more, with what is taken already
    erniem_fast.restore(models[1])
    assert [type(model).__module__.split(".")[0] for model in models] == ["erniem_fast", "transformers", "erniem_fast"]


def test_a_pipeline():
    tokenizer = _tokenizer()
    pipe = transformers.pipeline("feature-extraction", model=make(), tokenizer=tokenizer)
    texts = ["a b c d e f", "b"]
    expected = pipe(texts, batch_size=2)
    erniem_fast.optimize(pipe)
    assert_packed(pipe.model)
    for text, wanted, result in zip(texts, expected, pipe(texts, batch_size=2), strict=True):
        tokens = slice(len(tokenizer(text).input_ids))
        assert_close(torch.tensor(result)[0, tokens], torch.tensor(wanted)[0, tokens], atol=2e-5)


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _saved(folder, model):
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


def test_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    texts = ["a b c d e f g h", "b", "c d e", "h g f e d c b a a b"]
    model = st.SentenceTransformer(_saved(tmp_path / "bare", make()), device="cpu")
    expected = model.encode(texts)
    erniem_fast.optimize(model)
    assert_packed(model[0].auto_model)
    assert_close(torch.tensor(model.encode(texts)), torch.tensor(expected))
    # Processes of their own, which get the model as a pickle.
    assert_close(torch.tensor(model.encode(texts, device=["cpu", "cpu"])), torch.tensor(expected))
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(again[0].auto_model) is XLMRobertaModel
    assert_close(torch.tensor(again.encode(texts)), torch.tensor(expected))
    classifier = make(model_class=transformers.XLMRobertaForSequenceClassification, num_labels=1)
    ranker = st.CrossEncoder(_saved(tmp_path / "pair", classifier), device="cpu")
    pairs = [("a b", text) for text in texts]
    scores = ranker.predict(pairs)
    erniem_fast.optimize(ranker)
    assert_close(torch.tensor(ranker.predict(pairs)), torch.tensor(scores))


TABLES = ["word_embeddings", "position_embeddings", "token_type_embeddings"]


@pytest.mark.parametrize("targets", [["query", "dense"], TABLES], ids=["linears", "tables"])
@pytest.mark.parametrize("optimise_first", [True, False])
def test_peft(optimise_first, targets):
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    found = []
    for fast in (False, True):
        model = make()
        if fast and optimise_first:
            erniem_fast.optimize(model)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config)
        if fast and not optimise_first:
            erniem_fast.optimize(wrapped)
        if fast:
            assert_packed(model)
        output = wrapped(**INPUTS)
        output.pooler_output.sum().backward()
        found.append((output.last_hidden_state, gradients(wrapped)))
    assert found[0][1]
    assert_close(found[1][0][REAL_TOKENS], found[0][0][REAL_TOKENS], atol=2e-5)
    assert_same_gradients(found[1][1], found[0][1], rtol=GRADIENTS)


# --- Copies and files ------------------------------------------------------------------------------------------------


def through_torch(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch])
def test_copies_use_their_own_weights(copied):
    model = erniem_fast.optimize(make())
    expected = states(model)
    other = copied(model)
    assert_packed(other)
    assert torch.equal(states(other), expected)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.zero_()
    assert torch.equal(states(model), expected)
    assert not torch.equal(states(other), expected)


def test_a_pickle_is_loaded_by_another_process(tmp_path):
    model = erniem_fast.optimize(make())
    with open(tmp_path / "model", "wb") as file:
        pickle.dump((model, states(model)), file)
    code = (
        "import pickle, sys, torch; model, expected = pickle.load(open(sys.argv[1], 'rb'));"
        "from tests.families.test_objects import states; assert torch.allclose(states(model), expected, atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model"], check=True)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_what_is_saved_is_what_transformers_saves(head, tmp_path):
    kind = getattr(transformers, f"XLMRoberta{head}")
    stock, fast = both(model_class=kind)
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "fast" / file.name).read_bytes() == file.read_bytes(), file.name
    assert type(kind.from_pretrained(tmp_path / "fast")) is kind


def test_parameters_stay():
    model = make()
    parameters, config = dict(model.named_parameters()), model.config
    erniem_fast.optimize(model)
    assert list(model.state_dict()) == list(make().state_dict())
    assert all(each is parameters[name] for name, each in model.named_parameters())
    assert model.config is config
    assert repr(model) == repr(make())
    assert type(model).__name__ == "XLMRobertaModel"
    assert isinstance(model, XLMRobertaModel)


# --- Back ------------------------------------------------------------------------------------------------------------


def test_restore_leaves_nothing_behind():
    model, stock = make(), make()
    before = pickle.dumps(model)
    expected = states(stock)
    erniem_fast.optimize(model)
    states(model)
    assert erniem_fast.restore(model) is model
    for module, other in zip(model.modules(), stock.modules(), strict=True):
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()
    assert pickle.dumps(model) == before
    assert torch.equal(states(model), expected)
    assert erniem_fast.restore(model) is model


def test_restore_reaches_layers_that_were_wrapped_since():
    model = erniem_fast.optimize(make())
    layers = list(model.encoder.layer)
    model.encoder.layer[0] = nn.Sequential(layers[0])
    model.encoder = nn.Sequential(model.encoder)
    erniem_fast.restore(model)
    assert {type(each) for each in layers} == {modeling_xlm_roberta.XLMRobertaLayer}
    assert type(model.encoder[0]) is modeling_xlm_roberta.XLMRobertaEncoder


def test_transformers_stays_as_it_is():
    before = {name: vars(each).copy() for name, each in vars(modeling_bert).items() if isinstance(each, type)}
    states(erniem_fast.optimize(make("bert")))
    assert {name: vars(each) for name, each in vars(modeling_bert).items() if isinstance(each, type)} == before
    assert type(make("bert")) is BertModel
    assert type(make("bert").encoder.layer[0]) is modeling_bert.BertLayer


# --- Once more -------------------------------------------------------------------------------------------------------


def test_what_was_added_since_is_taken():
    """An encoder, a layer, and a model beside the one that was taken."""
    thing, other = nn.ModuleList([erniem_fast.optimize(make()), make("bert")]), make()
    expected = states(other)
    thing[0].encoder.layer[1] = other.encoder.layer[1]
    thing[1].encoder = make("bert").encoder
    erniem_fast.optimize(thing)
    for module in (thing[0].encoder.layer[1], thing[1], thing[1].encoder, thing[1].encoder.layer[0]):
        assert_packed(module)
    assert_close(states(thing[0])[REAL_TOKENS], expected[REAL_TOKENS], atol=2e-5)
    thing[1].encoder = make("bert").encoder
    erniem_fast.optimize(thing)
    assert_packed(thing[1].encoder.layer[0])
    assert states(thing[1]).isfinite().all()


def test_models_that_are_left_are_named(caplog):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    large = transformers.XLMRobertaXLForMaskedLM(transformers.XLMRobertaXLConfig(vocab_size=9, **sizes))
    odd, late = make(), make()
    odd.encoder = nn.Identity()
    late.forward = lambda *arguments, **options: None
    erniem_fast.optimize(nn.ModuleList([make("bert"), large, odd]))
    (line,) = warnings(caplog)
    assert "has taken BertModel, and left as they are: XLMRobertaXLModel (it normalises before" in line
    assert "XLMRobertaModel (its encoder is of type Identity, not transformers' own)" in line
    caplog.clear()
    with pytest.raises(TypeError, match="its forward was replaced on the object"):
        erniem_fast.optimize(late)
    with caplog.at_level(logging.INFO, "erniem_fast"):
        erniem_fast.optimize(make("bert"))
    assert warnings(caplog) == ["erniem_fast.optimize has taken BertModel."]
    caplog.clear()


# --- What is refused -------------------------------------------------------------------------------------------------


class Mine(XLMRobertaModel):
    pass


def test_nothing_found():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    large = transformers.XLMRobertaXLModel(transformers.XLMRobertaXLConfig(vocab_size=9, **sizes))
    other = make()
    other.encoder = nn.Identity()
    cases = {
        r"contains XLMRobertaModel\..*whose encoder is transformers' own": other,
        r"XLMRobertaXLModel is not taken because it normalises before.*take XLM-RoBERTa, RoBERTa": large,
        r"torch.nn.modules.container.Sequential, which contains no model of transformers, only": nn.Sequential(
            nn.Linear(2, 2)
        ),
        r"builtins.str, whose attributes hold no model": "xlm-roberta-base",
        r"contains Mine\..*not subclasses": Mine(make().config),
    }
    for message, thing in cases.items():
        for function in (erniem_fast.optimize, erniem_fast.restore):
            with pytest.raises(TypeError, match=message):
                function(thing)


def test_a_refused_form_of_weights_leaves_the_model():
    model = make()
    with pytest.raises(ValueError, match=r"weights='int4' is unknown"):
        erniem_fast.optimize(model, weights="int4")
    assert type(model) is XLMRobertaModel
    assert type(model.encoder.layer[0]) is modeling_xlm_roberta.XLMRobertaLayer
