"""An ERNIE-M checkpoint in sentence-transformers: encoded, saved, loaded, trained, and as a cross-encoder."""

import numpy as np
import pytest
import torch

import erniem_fast
from tests.golden import cases
from tests.integration.texts import TEXTS

sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `integrations` is not installed")
losses = pytest.importorskip("sentence_transformers.losses")
modules = pytest.importorskip("sentence_transformers.models")

LONG = "Ihr Kennwort wurde geändert. " * 200
ALL = [*TEXTS, LONG]
ATOL = 1e-6  # vectors of length 1: ten times what the order of sums makes of them


def make_encoder():
    words = modules.Transformer(str(cases.TINY))
    return sentence_transformers.SentenceTransformer(
        modules=[words, modules.Pooling(cases.HIDDEN, "mean")], device="cpu"
    )


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


def encode(encoder, texts, **options):
    return encoder.encode(texts, normalize_embeddings=True, **options)


@pytest.fixture(scope="module")
def vectors(encoder):
    """Of all texts in one batch."""
    return encode(encoder, ALL, batch_size=len(ALL))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)


def test_vectors_are_means_over_real_tokens(encoder, vectors):
    """Of the texts one by one, cut to the 512 tokens that the model has positions for."""
    assert encoder.get_max_seq_length() == 512
    model = erniem_fast.ErnieMModel.from_pretrained(cases.TINY).eval()
    tokenizer = erniem_fast.ErnieMTokenizer.from_pretrained(cases.TINY)
    for text, vector in zip(ALL, vectors, strict=True):
        encoded = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            mean = model(**encoded).last_hidden_state[0].mean(0)
        assert_close(vector, torch.nn.functional.normalize(mean, dim=0))
        assert_close(vector, encode(encoder, text))
    assert encoded["input_ids"].shape[1] == 512, "the last text must be too long"


def test_a_saved_encoder_is_loaded(encoder, vectors, tmp_path):
    encoder.save(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(again[0].auto_model) is erniem_fast.ErnieMModel
    assert type(again.tokenizer) is erniem_fast.ErnieMTokenizer
    assert again.get_max_seq_length() == 512
    assert_close(encode(again, ALL), vectors)


def test_a_checkpoint_without_modules_gets_the_mean(vectors):
    """As sentence-transformers loads any model of transformers."""
    loaded = sentence_transformers.SentenceTransformer(str(cases.TINY), device="cpu")
    assert_close(encode(loaded, ALL), vectors)


def test_lower_case(encoder, tmp_path):
    """sentence-transformers asks for it through the normalizer of a fast tokenizer."""
    words = modules.Transformer(str(cases.TINY), do_lower_case=True)
    lower = sentence_transformers.SentenceTransformer(
        modules=[words, modules.Pooling(cases.HIDDEN, "mean")], device="cpu"
    )
    lower.save(str(tmp_path))
    expected = encode(encoder, [text.lower() for text in TEXTS])
    for each in (lower, sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")):
        assert_close(encode(each, TEXTS), expected)


def test_several_processes(encoder, vectors):
    """They get the modules pickled, and with them import erniem_fast."""
    assert_close(encode(encoder, ALL, device=["cpu"] * 2, batch_size=4, chunk_size=5), vectors)


def test_training():
    """By one of its losses: the gradients of the same loss over our own model's means."""
    encoder = make_encoder().train()
    model = erniem_fast.ErnieMModel.from_pretrained(cases.TINY, **cases.NO_DROPOUT).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = erniem_fast.ErnieMTokenizer.from_pretrained(cases.TINY)
    sides, labels = (TEXTS[:8], TEXTS[8:]), torch.linspace(0, 1, 8)
    loss = losses.CosineSimilarityLoss(encoder)
    value = loss([encoder.tokenize(side) for side in sides], labels)
    value.backward()

    means = []
    for side in sides:
        encoded = tokenizer(side, padding=True, return_tensors="pt")
        mask = encoded["attention_mask"][..., None]
        means.append((model(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1))
    expected = (torch.cosine_similarity(*means) - labels).square().mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=ATOL)
    gradients = {name: each.grad for name, each in encoder[0].auto_model.named_parameters() if each.grad is not None}
    reached = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert gradients.keys() == reached.keys()
    scale = max(gradient.abs().max() for gradient in reached.values())
    for name, gradient in reached.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale)


def test_a_cross_encoder(tmp_path):
    torch.manual_seed(7)
    model = erniem_fast.ErnieMForSequenceClassification.from_pretrained(cases.TINY, num_labels=1).eval()
    tokenizer = erniem_fast.ErnieMTokenizer.from_pretrained(cases.TINY)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [*zip(TEXTS[:8], TEXTS[8:], strict=True), (TEXTS[0], LONG)]
    for pair, score in zip(pairs, encoder.predict(pairs), strict=True):
        encoded = tokenizer(*pair, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            assert_close(score, model(**encoded).logits[0, 0].sigmoid())
        assert_close(score, encoder.predict([pair])[0])
