"""XLM-RoBERTa as ERNIE-M and back: the same numbers, and what has no counterpart is named."""

import copy

import pytest
import torch
import transformers

import erniem_fast
from erniem_fast import ErnieMForInformationExtraction, ErnieMForQuestionAnswering, ErnieMModel
from erniem_fast.conversion import from_xlm_roberta, to_xlm_roberta
from tests.families.tiny import make
from tests.golden import cases
from tests.model.tiny import RIGHT, load, logits_of

IDS = torch.randint(4, 100, RIGHT.shape, generator=torch.Generator().manual_seed(0)).masked_fill(RIGHT == 0, 1)
HEADS = {
    "XLMRobertaModel": ("ErnieMModel", {}),
    "XLMRobertaForMaskedLM": ("ErnieMForMaskedLM", {}),
    "XLMRobertaForSequenceClassification": ("ErnieMForSequenceClassification", {"num_labels": 3}),
    "XLMRobertaForTokenClassification": ("ErnieMForTokenClassification", {"num_labels": 5}),
    "XLMRobertaForQuestionAnswering": ("ErnieMForQuestionAnswering", {}),
    "XLMRobertaForMultipleChoice": ("ErnieMForMultipleChoice", {}),
}


def make_xlm_roberta(name, **options):
    return make(model_class=getattr(transformers, name), **HEADS[name][1], **options)


def results(model, ids=IDS, mask=RIGHT):
    """What the model computes at real tokens, and the pooled output."""
    if "MultipleChoice" in type(model).__name__:
        ids, mask = ids.view(2, 2, -1), mask.view(2, 2, -1)
    with torch.inference_mode():
        outputs = logits_of(model(input_ids=ids, attention_mask=mask))
    real = mask.bool()
    return {
        name: value[real] if value.shape[:2] == real.shape else value
        for name, value in outputs.items()
        if value is not None
    }


def assert_same(actual, expected, atol):
    found, wanted = results(actual), results(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol)


@pytest.mark.parametrize("name", HEADS)
def test_the_same_function_there_and_back(name):
    """In float64, where nothing but the order of three summands differs; and in float32, where that is a rounding."""
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        stock = make_xlm_roberta(name).to(dtype)
        if dtype == torch.float32:
            for parameter in stock.parameters():
                parameter.data.mul_(0.3 if parameter.dim() == 2 else 1.0)
        ours = from_xlm_roberta(stock)
        assert (type(ours).__name__, ours.dtype, ours.training) == (HEADS[name][0], dtype, False)
        assert_same(ours, stock, atol)
        again = to_xlm_roberta(ours)
        assert type(again) is type(stock)
        assert_same(again, stock, atol)
        assert again.config.num_labels == stock.config.num_labels
        for key, value in stock.state_dict().items():
            if "position" not in key and "token_type" not in key:
                assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("tied", [True, False])
def test_words(tied, caplog):
    """The last product's weights are the word table's in both if they were; our pooler is dropped, or made anew.

    The bias of the last product has two names in ours in any case; theirs has another one if the table is not shared.
    """
    stock = make_xlm_roberta("XLMRobertaForMaskedLM", tie_word_embeddings=tied).double()
    labels = IDS.masked_fill(RIGHT == 0, -100)
    ours = from_xlm_roberta(stock)
    again = to_xlm_roberta(ours)
    assert_same(again, stock, 1e-13)
    for model in (ours, again):
        assert (model.lm_head.decoder.weight is model.get_input_embeddings().weight) is tied
        assert (model.lm_head.bias is model.lm_head.decoder.bias) is (tied or model is ours)
        loss = model(input_ids=IDS, attention_mask=RIGHT, labels=labels).loss
        torch.testing.assert_close(loss, stock(IDS, RIGHT, labels=labels).loss, rtol=0, atol=1e-13)
    assert 0.015 < ours.ernie_m.pooler.dense.weight.std() < 0.025
    assert again.state_dict().keys() == stock.state_dict().keys()
    assert "UNEXPECTED" not in caplog.text


def test_there_and_back_from_ernie_m_nothing_changes():
    for model in (load(), load(ErnieMForQuestionAnswering), load(num_hidden_layers=0)):
        model.train().bfloat16()
        again = from_xlm_roberta(to_xlm_roberta(model))
        assert (again.dtype, again.training, type(again)) == (torch.bfloat16, True, type(model))
        for field in ("max_position_embeddings", "intermediate_size", "layer_norm_eps", "pad_token_id", "num_labels"):
            assert getattr(again.config, field) == getattr(model.config, field)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


def test_another_id_of_padding_moves_the_positions():
    for pad in (0, 3):
        stock = make_xlm_roberta("XLMRobertaModel", pad_token_id=pad).double()
        ours = from_xlm_roberta(stock)
        assert ours.config.max_position_embeddings == 40 - (pad + 1) + 2
        again = to_xlm_roberta(ours)
        assert again.config.max_position_embeddings == 40
        for model in (ours, again):
            assert_same(model, stock, 1e-13)


def test_the_new_model_has_weights_of_its_own():
    stock = make_xlm_roberta("XLMRobertaModel")
    before = copy.deepcopy(stock.state_dict())
    for parameter in from_xlm_roberta(stock).parameters():
        parameter.data.zero_()
    assert all(torch.equal(stock.state_dict()[key], value) for key, value in before.items())


def test_an_encoder_without_a_pooler_and_an_optimised_one():
    stock = make(model_class=transformers.XLMRobertaModel)
    stock.pooler = None
    ours = from_xlm_roberta(erniem_fast.optimize(copy.deepcopy(stock)).double())
    assert ours.pooler is None
    assert_same(ours, stock.double(), 1e-13)
    assert to_xlm_roberta(ours).pooler is None


def test_real_training_reaches_all_weights():
    """Gradients of the converted model exist, except for the row of padding."""
    ours = from_xlm_roberta(make_xlm_roberta("XLMRobertaForSequenceClassification"))
    ours.train()(input_ids=IDS, attention_mask=RIGHT, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def pruned():
    model = load()
    model.prune_heads({0: [1]})
    return model


def types():
    return make(model_class=transformers.XLMRobertaModel, type_vocab_size=2)


REFUSED = {
    "a causal language model": (
        from_xlm_roberta,
        lambda: make(model_class=transformers.XLMRobertaForCausalLM),
        r"XLMRobertaForCausalLM has a head that ERNIE-M does not have, .* encoder alone, which is model\.roberta",
    ),
    "another family": (
        from_xlm_roberta,
        lambda: make("bert"),
        "BertModel has a head that ERNIE-M does not have, or is",
    ),
    "two token types": (from_xlm_roberta, types, "ERNIE-M has nothing like type_vocab_size=2"),
    "a decoder": (
        from_xlm_roberta,
        lambda: make(model_class=transformers.XLMRobertaModel, is_decoder=True),
        "ERNIE-M has nothing like is_decoder=True",
    ),
    "information extraction": (
        to_xlm_roberta,
        lambda: load(ErnieMForInformationExtraction),
        r"ErnieMForInformationExtraction has a head that XLM-RoBERTa does not have, .* which is model\.ernie_m",
    ),
    "pruned heads": (to_xlm_roberta, pruned, r"XLM-RoBERTa has nothing like pruned_heads=\{0: \[1\]\}"),
    "dropout": (
        to_xlm_roberta,
        lambda: ErnieMModel.from_pretrained(cases.TINY, act_dropout=0.5),
        "nothing like act_dropout=0.5, which this model has; only 0.0 maps",
    ),
    "int8 weights": (
        to_xlm_roberta,
        lambda: erniem_fast.optimize(load(), weights="int8"),
        r"has a tensor '.*', which XLM-RoBERTa does not have; merge adapters .* call erniem_fast\.restore\(model\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_named(case):
    convert, model, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        convert(model())
