"""`embed` beside transformers' own models, one text at a time, and beside sentence-transformers."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

import erniem_fast
from erniem_fast.embedding import batches
from tests.embedding import tiny
from tests.embedding.tiny import ALL, LIMIT

sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `integrations` is not installed")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
Transformer = pytest.importorskip("sentence_transformers.base.modules").Transformer

FEW = [*ALL[:4], "", tiny.LONG, "a"]
ATOL = 2e-6  # vectors of length 1: twenty times what the order of sums makes of them


@pytest.fixture(scope="module")
def stock(checkpoint):
    return AutoModel.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def model(stock):
    """Optimised; ERNIE-M needs no more than its own class."""
    return erniem_fast.optimize(copy.deepcopy(stock))


@pytest.fixture(scope="module")
def ernie_m():
    return AutoModel.from_pretrained(tiny.cases.TINY)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def states(stock, tokenizer, family):
    """The hidden states of each text, computed alone by transformers' own forward."""
    found = []
    for text in ALL:
        encoded = tokenizer(text, truncation=True, max_length=LIMIT[family], return_tensors="pt")
        with torch.inference_mode():
            found.append(stock(**encoded).last_hidden_state[0])
    return found


REDUCTIONS = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "max": lambda states: states.amax(0),
    "last": lambda states: states[-1],
}


def reduced(states, pooling="mean", normalize=True):
    vectors = torch.stack([REDUCTIONS[pooling](each) for each in states])
    return (torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors).numpy()


def assert_close(actual, expected, atol=ATOL):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("pooling", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "plain"])
def test_vectors_are_those_of_each_text_alone(model, states, pooling, normalize):
    vectors = erniem_fast.embed(model, ALL, pooling=pooling, normalize=normalize, tokens_per_batch=200)
    assert_close(vectors, reduced(states, pooling, normalize), ATOL if normalize else 1e-5)


def test_a_stock_model_is_given_padding(stock, model, states):
    vectors = erniem_fast.embed(stock, ALL, tokens_per_batch=200)
    assert_close(vectors, reduced(states))


def test_a_model_that_falls_back_is_given_padding(model, states):
    """A hook on a layer, or on an attention, is called: by transformers' own forward."""
    calls = []
    inner = model.get_submodule("encoder.layers.0" if hasattr(model.encoder, "layers") else "encoder.layer.0.attention")
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert_close(erniem_fast.embed(model, ALL), reduced(states))
    finally:
        handle.remove()
    assert calls


def test_padding_written_in_a_text_counts_as_in_transformers(model, stock, tokenizer):
    text = f"Kennwort{tokenizer.pad_token}geändert"
    encoded = tokenizer(text, return_tensors="pt")
    assert (encoded["input_ids"] == tokenizer.pad_token_id).any()
    encoded["attention_mask"] = torch.ones_like(encoded["input_ids"])
    with torch.inference_mode():
        states = stock(**encoded).last_hidden_state
    assert_close(erniem_fast.embed(model, ["a b", text, "c"])[1:2], reduced(states))


def test_other_objects_that_hold_the_model(checkpoint, model, tokenizer, states):
    extractor = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    assert_close(erniem_fast.embed(extractor, ALL), reduced(states))


def test_a_head_is_left_out(classifier, family):
    head = erniem_fast.optimize(erniem_fast.AutoModelForSequenceClassification.from_pretrained(classifier))
    bare = AutoModel.from_pretrained(classifier)
    assert_close(erniem_fast.embed(head, ALL[:5]), erniem_fast.embed(bare, ALL[:5]))


def test_results_of_torch(model, states):
    vectors = erniem_fast.embed(model, ALL, convert_to_tensor=True)
    assert isinstance(vectors, torch.Tensor)
    assert_close(vectors.numpy(), reduced(states))


def test_an_iterator_is_read_as_results_are_taken(model, states, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW_TEXTS", 4)
    read = []
    results = erniem_fast.embed(model, (read.append(text) or text for text in itertools.cycle(ALL)))
    assert read == []
    first, second = next(results), next(results)
    assert len(read) == 8, "no more texts are read than are needed"
    assert_close(np.concatenate([first, second]), reduced(states)[:8])


def test_windows_end_where_their_texts_are_long(monkeypatch):
    monkeypatch.setattr(batches, "WINDOW_CHARACTERS", 10)
    assert list(batches.windows(["abcdefghij", "abc", "abcdefg", "a", "b"])) == [
        ["abcdefghij"],
        ["abc", "abcdefg"],
        ["a", "b"],
    ]


def test_no_texts(ernie_m):
    assert erniem_fast.embed(ernie_m, []).shape == (0, ernie_m.config.hidden_size)
    assert list(erniem_fast.embed(ernie_m, iter([]))) == []


def test_cut_texts_are_counted(ernie_m, caplog):
    with caplog.at_level(logging.WARNING):
        erniem_fast.embed(ernie_m, ["a", tiny.LONG, "b"], max_length=20)
    assert "1 of 3 texts reached the limit of 20 tokens; what follows is cut off." in caplog.messages


def test_the_prompt_comes_before_each_text(ernie_m):
    prompted = erniem_fast.embed(ernie_m, ["a", "b c"], prompt="query: ")
    assert_close(prompted, erniem_fast.embed(ernie_m, ["query: a", "query: b c"]))


@pytest.mark.parametrize("pads", [False, True], ids=["packed", "padded"])
def test_batches_hold_as_many_tokens_as_they_may(pads):
    lengths = [3, 9, 1, 4, 4, 2]
    found = list(batches.by_tokens(lengths, 8, pads))
    assert found == ([[1], [3, 4], [0, 5], [2]] if pads else [[1], [3, 4], [0, 5, 2]])


# --- sentence-transformers ------------------------------------------------------------------------------------------


def make(checkpoint, *after, mode="mean", **options):
    words = Transformer(checkpoint)
    pooling = modules.Pooling(words.get_embedding_dimension(), mode, include_prompt=options.pop("include_prompt", True))
    return sentence_transformers.SentenceTransformer(modules=[words, pooling, *after], device="cpu", **options)


def test_a_sentence_transformer_keeps_its_pooling(checkpoint):
    words = Transformer(checkpoint)
    width, unit = words.get_embedding_dimension(), modules.Normalize()
    encoders = [
        sentence_transformers.SentenceTransformer(modules=[words, modules.Pooling(width, mode), unit], device="cpu")
        for mode in ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("cls", "mean"))
    ]
    expected = [encoder.encode(FEW) for encoder in encoders]
    erniem_fast.optimize(words)
    for encoder, vectors in zip(encoders, expected, strict=True):
        assert_close(erniem_fast.embed(encoder, FEW, tokens_per_batch=200), vectors)


def test_a_sentence_transformer_keeps_its_other_modules(checkpoint):
    torch.manual_seed(0)
    width = make(checkpoint).get_embedding_dimension()
    encoder = make(checkpoint, modules.Dense(width, 24, activation_function=torch.nn.Tanh()), truncate_dim=16)
    encoder.max_seq_length = 15
    expected = encoder.encode(FEW, normalize_embeddings=True)
    vectors = erniem_fast.embed(erniem_fast.optimize(encoder), FEW, normalize=True)
    assert vectors.shape == (len(FEW), 16)
    assert_close(vectors, expected)


def test_modules_that_need_rows_get_them(checkpoint):
    encoder = make(checkpoint)
    layers = modules.WeightedLayerPooling(encoder.get_embedding_dimension(), num_hidden_layers=2)
    words = Transformer(checkpoint, config_kwargs={"output_hidden_states": True})
    encoder = sentence_transformers.SentenceTransformer(modules=[words, layers, encoder[1]], device="cpu")
    expected = encoder.encode(FEW, normalize_embeddings=True)
    assert_close(erniem_fast.embed(erniem_fast.optimize(encoder), FEW, normalize=True), expected)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_of_a_sentence_transformer(checkpoint, include_prompt):
    prompts = {"query": "query: ", "passage": "passage: "}
    encoder = make(
        checkpoint, modules.Normalize(), include_prompt=include_prompt, prompts=prompts, default_prompt_name="passage"
    )
    expected = [encoder.encode(FEW), encoder.encode(FEW, prompt_name="query"), encoder.encode(FEW, prompt="ab ")]
    erniem_fast.optimize(encoder)
    for options, vectors in zip(({}, {"prompt_name": "query"}, {"prompt": "ab "}), expected, strict=True):
        assert_close(erniem_fast.embed(encoder, FEW, **options), vectors)
    with pytest.raises(
        ValueError, match=r"prompt_name='other' is not one of the model's prompts, .*'passage', 'query'"
    ):
        erniem_fast.embed(encoder, FEW, prompt_name="other")
    with pytest.raises(ValueError, match="Pass prompt or prompt_name"):
        erniem_fast.embed(encoder, FEW, prompt_name="query", prompt="a")


@pytest.mark.parametrize(
    ("option", "message"),
    [({"pooling": "cls"}, "keeps its own pooling"), ({"max_length": 9}, "keeps its own max_seq_length")],
)
def test_a_sentence_transformer_has_its_own_settings(checkpoint, option, message):
    with pytest.raises(ValueError, match=message):
        erniem_fast.embed(make(checkpoint), FEW, **option)


@pytest.mark.parametrize("index", [np.int64, torch.tensor])
def test_numbers_may_be_those_of_numpy_and_torch(ernie_m, index):
    numbers = {"max_length": 9, "tokens_per_batch": 40}
    found = erniem_fast.embed(ernie_m, FEW, **{name: index(number) for name, number in numbers.items()})
    np.testing.assert_array_equal(found, erniem_fast.embed(ernie_m, FEW, **numbers))


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "texts is of type str; pass a list"),
        (3, "texts is of type int; pass a list"),
        (["a", None], r"texts\[1\] is None, of type NoneType; texts must be strings"),
        (["a", b"b"], r"texts\[1\] is b'b', of type bytes"),
        ([["a", "b"]], r"texts\[0\] is \['a', 'b'\], of type list"),
        (np.array("a"), "texts is of type ndarray; pass a list"),
        (np.array([["a"]]), "texts is of type ndarray; pass a list"),
    ],
)
def test_what_is_no_text(ernie_m, texts, message):
    with pytest.raises(TypeError, match=message):
        erniem_fast.embed(ernie_m, texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "median"}, "pooling='median' is unknown; use 'mean', 'cls', 'max', 'last'"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0 must be an integer of at least 1"),
        ({"tokens_per_batch": None}, "tokens_per_batch=None must be an integer"),
        ({"max_length": 2}, r"max_length=2 must be an integer in \[3, "),
        ({"max_length": 1000}, r"max_length=1000 must be an integer in"),
        ({"max_length": "9"}, r"max_length='9' must be an integer in"),
        ({"prompt_name": "query"}, "prompt_name='query' is for a SentenceTransformer"),
    ],
)
def test_options_are_checked_before_a_stream_is_read(ernie_m, options, message):
    with pytest.raises(ValueError, match=message):
        erniem_fast.embed(ernie_m, iter(["a"]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 3}, "prompt is 3, of type int; pass a string"),
        ({"tokenizer": "a"}, "tokenizer is of type str; pass a tokenizer"),
    ],
)
def test_options_of_other_types(ernie_m, options, message):
    with pytest.raises(TypeError, match=message):
        erniem_fast.embed(ernie_m, ["a"], **options)


def test_half_of_a_surrogate_pair_is_named(model):
    with pytest.raises(ValueError, match=r"texts\[1\], 'a\\ud83d', has half of a surrogate pair"):
        erniem_fast.embed(model, ["a", "a\ud83d"])


@pytest.mark.parametrize("length", [1, 5])
def test_a_length_that_is_not_that_of_the_texts(ernie_m, length):
    class Texts(list):
        def __len__(self):
            return length

    with pytest.raises(ValueError, match=f"The length of the input is {length}, but it holds 2 items"):
        erniem_fast.embed(ernie_m, Texts(["a", "b"]))


def test_a_text_without_tokens(model, tokenizer):
    def tokenize(items, **options):
        return tokenizer(items, add_special_tokens=False, **options)

    tokenize.model_max_length, tokenize.pad_token_id = tokenizer.model_max_length, tokenizer.pad_token_id
    with pytest.raises(ValueError, match="'' has no tokens"):
        erniem_fast.embed(model, ["a", ""], tokenize)


def test_models_that_have_no_vectors(ernie_m):
    with pytest.raises(TypeError, match="model is of type Linear with 0 encoders"):
        erniem_fast.embed(torch.nn.Linear(2, 2), ["a"])
    with pytest.raises(TypeError, match="model is of type ModuleList with 2 encoders"):
        erniem_fast.embed(torch.nn.ModuleList([ernie_m, copy.deepcopy(ernie_m)]), ["a"])


def test_a_model_without_a_checkpoint_needs_its_tokenizer(ernie_m):
    fresh = copy.deepcopy(ernie_m)
    fresh.name_or_path = ""
    with pytest.raises(ValueError, match="tokenizer is None, but the model was not loaded from a checkpoint"):
        erniem_fast.embed(fresh, ["a"])
