"""Truncation, overflow and windows: against transformers 4.57.6 (golden/README.md), and against a fast tokenizer."""

import json
import lzma

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from erniem_fast import ErnieMTokenizer
from tests.golden.cases import GOLDEN
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE

FIELDS = dict.fromkeys(["return_token_type_ids", "return_special_tokens_mask", "return_offsets_mapping"], True)


def make_tokenizer(side="right", padding_side="right"):
    return ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, truncation_side=side, padding_side=padding_side)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# ---- Equal to 4.57.6


@pytest.fixture(scope="module")
def calls():
    """Every golden call's tokenizer, examples, arguments and outputs."""
    with lzma.open(GOLDEN / "tokenizer.json.xz") as file:
        golden = json.load(file)["truncation"]
    by_side = {side: make_tokenizer(side) for side in ("right", "left")}
    return [
        (by_side[call["side"]], example, call["arguments"], output)
        for call in golden["calls"]
        for example, output in zip(golden["examples"], call["outputs"], strict=True)
    ]


def test_every_strategy_side_and_stride(calls):
    assert len(calls) == 2 * 3 * 6 * 2 * 5
    for tokenizer, (first, second), arguments, expected in calls:
        arguments = arguments | {
            "return_overflowing_tokens": "overflowing_tokens" in expected,
            "return_attention_mask": False,
        }
        assert dict(tokenizer(first, second, **arguments)) == expected
        pairs = None if second is None else [second]
        assert dict(tokenizer([first], pairs, **arguments)) == {name: [value] for name, value in expected.items()}


def test_ids_are_truncated_as_texts_are(calls):
    for tokenizer, example, arguments, expected in calls:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in example if text is not None]
        wants_overflow = "overflowing_tokens" in expected
        prepared = tokenizer.prepare_for_model(
            *ids, **arguments, return_overflowing_tokens=wants_overflow, return_attention_mask=False
        )
        assert dict(prepared) == expected
        excess = len(tokenizer.build_inputs_with_special_tokens(*ids)) - arguments["max_length"]
        pair = ids[1] if len(ids) == 2 else None
        left = tokenizer.truncate_sequences(ids[0], pair, excess, arguments["truncation"], arguments["stride"])
        assert tokenizer.build_inputs_with_special_tokens(*left[:2]) == expected["input_ids"]
        assert left[2] == expected.get("overflowing_tokens", [])


def test_prepared_tensors_keep_their_overflow(tokenizer):
    arguments = {"truncation": True, "max_length": 5, "return_overflowing_tokens": True}
    prepared = tokenizer.prepare_for_model([5, 6, 7, 8], return_tensors="pt", prepend_batch_axis=True, **arguments)
    assert prepared["input_ids"].tolist() == [[tokenizer.cls_token_id, 5, 6, 7, tokenizer.sep_token_id]]
    assert prepared["overflowing_tokens"].tolist() == [[8]]


@pytest.mark.parametrize(
    ("pair", "strategy", "message"),
    [
        ("x y z", "only_first", "truncation='only_first' has to take 6 tokens out of the first sequence, which has 3"),
        ("x y z", "only_second", "truncation='only_second' has to take 6 tokens out of the second sequence, which has"),
        (None, "only_second", "truncation='only_second' has to take 1 tokens out of the second sequence, which has 0"),
    ],
)
def test_what_cannot_be_cut_is_left_whole_and_an_error_is_logged(tokenizer, caplog, pair, strategy, message):
    whole = tokenizer("password here", pair)
    assert tokenizer("password here", pair, truncation=strategy, max_length=4) == whole
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert caplog.messages[0].startswith(message)


def test_overflow_is_counted_from_0_without_a_maximum(tokenizer):
    """4.57.6 raises TypeError here."""
    encoding = tokenizer("Save", return_overflowing_tokens=True)
    assert (encoding["overflowing_tokens"], encoding["num_truncated_tokens"]) == ([], 0)


# ---- Windows


@pytest.fixture(scope="module")
def words(tokenizer):
    """Words that are one token each."""
    candidates = [token[1:] for token in tokenizer.vocab if token[1:].isascii() and token[1:].isalpha()]
    return [word for word in candidates if tokenizer.tokenize(word) == ["▁" + word]][:40]


def make_fast(tokenizer, words, side, padding_side):
    """A fast tokenizer with the ids and the layout of `tokenizer`, for texts of these words."""
    ids = {word: tokenizer.vocab["▁" + word] for word in words}
    ids |= {token: tokenizer.vocab[token] for token in ("[CLS]", "[PAD]", "[SEP]", "[UNK]")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP]:1 [SEP]:1 $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", truncation_side=side, padding_side=padding_side
    )


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("strategy", "max_length", "stride"),
    [
        (True, 3, 0),
        (True, 9, 2),
        (True, 9, 6),
        ("only_first", 10, 0),
        ("only_first", 16, 3),
        ("only_second", 16, 0),
        ("only_second", 16, 6),
        (False, None, 0),
    ],
)
def test_windows_are_those_of_a_fast_tokenizer(tokenizer, words, strategy, max_length, stride, side, padding_side):
    ours, fast = make_tokenizer(side, padding_side), make_fast(tokenizer, words, side, padding_side)
    texts = [" ".join(words[:count]) for count in (25, 1, 7, 8, 0, 14, 13)]
    questions = [" ".join(words[-5:])] * len(texts)
    batch = {True: (texts,), "only_first": (texts, questions), "only_second": (questions, texts)}.get(
        strategy, (texts,)
    )
    arguments = FIELDS | {
        "truncation": strategy,
        "max_length": max_length,
        "stride": stride,
        "return_overflowing_tokens": True,
    }
    expected = fast(*batch, **arguments)
    assert dict(ours(*batch, **arguments)) == dict(expected)
    expected = fast(*batch, padding=True, return_tensors="pt", **arguments)
    encoding = ours(*batch, return_tensors="pt", **arguments)
    assert encoding.keys() == expected.keys()
    assert all(torch.equal(encoding[name], expected[name]) for name in expected)


def test_windows_of_one_text_are_rows_too(tokenizer):
    arguments = {"truncation": True, "max_length": 5, "stride": 1, "return_overflowing_tokens": True}
    arguments |= {"return_length": True}
    a, b, c, d = tokenizer.convert_tokens_to_ids(["▁a", "▁b", "▁c", "▁d"])
    cls, sep, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    encoding = tokenizer("a b c d", return_tensors="pt", **arguments)
    assert encoding["input_ids"].tolist() == [[cls, a, b, c, sep], [cls, c, d, sep, pad]]
    assert encoding["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert encoding["overflow_to_sample_mapping"].tolist() == [0, 0]
    assert encoding["length"].tolist() == [5, 5]
    encoding = tokenizer("a b c d", return_offsets_mapping=True, **arguments)
    assert encoding["input_ids"] == [[cls, a, b, c, sep], [cls, c, d, sep]]
    assert encoding["length"] == [5, 4]
    assert tokenizer.encode("a b c d", return_tensors="pt", **arguments).shape == (2, 5)


def test_a_text_that_cannot_be_cut_is_one_window(tokenizer):
    arguments = {"truncation": "only_second", "max_length": 6, "return_overflowing_tokens": True}
    encoding = tokenizer(["a", "a b c d"], ["b c", "b"], return_tensors="pt", **arguments)
    assert encoding["overflow_to_sample_mapping"].tolist() == [0, 0, 1]
    assert encoding["attention_mask"].sum(1).tolist() == [6, 6, 9]


@pytest.mark.parametrize("stride", [-1, 3, 4])
def test_a_stride_that_leaves_no_new_token_is_refused(tokenizer, stride):
    arguments = {"truncation": True, "max_length": 5, "stride": stride, "return_overflowing_tokens": True}
    message = rf"stride={stride} must be at least 0 and less than 3, .*: choose a smaller stride or a larger max_length"
    with pytest.raises(ValueError, match=message):
        tokenizer("a b c d", return_tensors="pt", **arguments)
    assert dict(tokenizer("a b c", return_tensors="pt", **arguments)).keys() >= {"overflow_to_sample_mapping"}


@pytest.mark.parametrize("arguments", [{}, {"return_tensors": "pt"}, {"return_offsets_mapping": True}])
def test_overflow_of_both_texts_of_a_pair_is_refused(tokenizer, arguments):
    with pytest.raises(ValueError, match=r"return_overflowing_tokens=True .* use truncation='only_first' or"):
        tokenizer("a", "b", truncation=True, max_length=5, return_overflowing_tokens=True, **arguments)
