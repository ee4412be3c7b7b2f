"""`score` beside transformers' classifiers, one pair at a time, and beside `CrossEncoder.predict`."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import erniem_fast
from tests.embedding import tiny
from tests.embedding.tiny import LIMIT, PAIRS

ATOL = 1e-5  # scores are sigmoids, or logits below ten: a few units in the last place of those


@pytest.fixture(scope="module")
def stock(classifier):
    return AutoModelForSequenceClassification.from_pretrained(classifier).eval()


@pytest.fixture(scope="module")
def logits(stock, classifier, family):
    """Of each pair, computed alone by transformers' own forward."""
    tokenizer, found = AutoTokenizer.from_pretrained(classifier), []
    for pair in PAIRS:
        encoded = tokenizer([pair], truncation=True, max_length=LIMIT[family], return_tensors="pt")
        with torch.inference_mode():
            found.append(stock(**encoded).logits[0])
    return torch.stack(found)


@pytest.fixture(scope="module")
def model(classifier, logits):
    return erniem_fast.optimize(AutoModelForSequenceClassification.from_pretrained(classifier))


def expected(logits):
    return (logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits).numpy()


def assert_close(actual, wanted, atol=ATOL):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def test_scores_are_those_of_each_pair_alone(model, logits):
    assert np.ptp(logits.numpy(), axis=0).min() > 0.1, "the pairs must differ"
    assert_close(erniem_fast.score(model, PAIRS, tokens_per_batch=150), expected(logits))
    assert_close(np.concatenate(list(erniem_fast.score(model, iter(PAIRS)))), expected(logits))


def test_an_optimised_model_is_given_no_padding(model, logits, monkeypatch):
    forward = type(model).forward

    def without_rows(self, *arguments, **options):
        assert "attention_mask" not in options
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", without_rows)
    assert_close(erniem_fast.score(model, PAIRS), expected(logits))


def test_a_stock_model_is_given_padding(stock, logits):
    assert_close(erniem_fast.score(stock, PAIRS, tokens_per_batch=150), expected(logits))


def test_a_hook_on_the_model_is_called(model, logits):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert_close(erniem_fast.score(model, PAIRS), expected(logits))
    finally:
        handle.remove()
    assert calls


def test_a_pipeline(model, classifier, logits):
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(classifier))
    assert_close(erniem_fast.score(classify, PAIRS), expected(logits))


def test_activations(model, logits):
    scores = erniem_fast.score(model, PAIRS, activation_fn=torch.nn.Tanh(), convert_to_tensor=True)
    assert_close(scores.numpy(), logits.tanh().squeeze(-1).numpy())
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    try:
        assert_close(erniem_fast.score(model, PAIRS), logits.squeeze(-1).numpy())
        model.config.sentence_transformers = {"activation_fn": "os.system"}
        assert_close(erniem_fast.score(model, PAIRS), expected(logits))
    finally:
        del model.config.sentence_transformers


def test_a_cross_encoder(classifier, logits):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(classifier, device="cpu", prompts={"long": "ab "})
    found, prompted = encoder.predict(PAIRS), encoder.predict(PAIRS, prompt_name="long")
    assert_close(found, expected(logits))
    erniem_fast.optimize(encoder)
    assert_close(erniem_fast.score(encoder, PAIRS, tokens_per_batch=150), found)
    assert_close(erniem_fast.score(encoder, PAIRS, prompt_name="long"), prompted)
    encoder.max_seq_length = 20
    assert_close(erniem_fast.score(encoder, PAIRS), encoder.predict(PAIRS))
    with pytest.raises(ValueError, match="a model of type CrossEncoder keeps its own max_seq_length"):
        erniem_fast.score(encoder, PAIRS, max_length=9)
    with pytest.raises(TypeError, match=r"model is of type CrossEncoder.*; score pairs with erniem_fast.score"):
        erniem_fast.embed(encoder, ["a"])


def test_no_pairs(model, logits):
    shape = () if logits.shape[1] == 1 else (3,)
    assert erniem_fast.score(model, []).shape == (0, *shape)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("ab", "pairs is of type str; pass a list"),
        (("a", "b"), r"pairs\[0\] is 'a'; a pair must hold two strings.*pass \[pair\]"),
        ([("a", "b"), ("a", None)], r"pairs\[1\] is \('a', None\)"),
        ([("a", "b", "c")], r"pairs\[0\] is \('a', 'b', 'c'\)"),
        ([{"query": "a", "document": "b"}], r"pairs\[0\] is \{'query'"),
        ([{"a", "b"}], r"pairs\[0\] is \{'.', '.'\}"),
    ],
)
def test_what_is_no_pair(pairs, message):
    model = erniem_fast.ErnieMForSequenceClassification.from_pretrained(tiny.cases.TINY)
    with pytest.raises(TypeError, match=message):
        erniem_fast.score(model, pairs)


def test_half_of_a_surrogate_pair_is_named(model):
    with pytest.raises(ValueError, match=r"pairs\[0\], \('a', '\\ud83d'\), has half of a surrogate pair"):
        erniem_fast.score(model, [("a", "\ud83d")])


def test_models_that_do_not_score():
    bare = erniem_fast.ErnieMModel.from_pretrained(tiny.cases.TINY)
    with pytest.raises(TypeError, match="model is of type ErnieMModel; pass a CrossEncoder or a model for sequence"):
        erniem_fast.score(bare, PAIRS)
