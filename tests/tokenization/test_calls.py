"""What a call takes and returns: batches, masks, errors, sampling."""

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)

from erniem_fast import ErnieMTokenizer
from tests.golden.cases import TINY
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE


def test_a_batch_equals_its_texts_one_by_one(golden, texts):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"num_threads": 3})
    batch = golden["odd"]["texts"] + texts[:2000]
    one_by_one = [tokenizer(text, return_offsets_mapping=True) for text in batch]
    together = tokenizer(batch, return_offsets_mapping=True)
    for name in ("input_ids", "offset_mapping"):
        assert together[name] == [encoding[name] for encoding in one_by_one]


class SpyProcessor:
    """A SentencePieceProcessor that notes what `encode` is asked for."""

    def __init__(self, processor):
        self.processor, self.calls = processor, []

    def encode(self, texts, **kwargs):
        self.calls.append((texts, kwargs))
        return self.processor.encode(texts, **kwargs)

    def __getattr__(self, name):
        return getattr(self.processor, name)


def test_large_batches_go_through_sentencepieces_threads(texts):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"num_threads": 3})
    tokenizer.sp_model = spy = SpyProcessor(tokenizer.sp_model)
    tokenizer(texts[:1000])
    assert spy.calls == [(texts[:1000], {"out_type": str, "num_threads": 3})]
    spy.calls.clear()
    tokenizer(texts[:10])
    assert spy.calls == [(text, {"out_type": str}) for text in texts[:10]]


def test_kinds_of_input(tokenizer):
    one = tokenizer("Save")["input_ids"]
    ids = one[1:-1]
    pair = tokenizer("Save", "Save")["input_ids"]
    assert tokenizer(ids)["input_ids"] == one
    assert tokenizer([ids, ids])["input_ids"] == [one, one]
    assert tokenizer(["Save"], is_split_into_words=True)["input_ids"] == one
    assert tokenizer([["Save"], ["Save"]], is_split_into_words=True)["input_ids"] == [one, one]
    assert tokenizer([("Save", "Save"), ["Save", "Save"]])["input_ids"] == [pair, pair]
    assert tokenizer([(["Save"], ["Save"])], is_split_into_words=True)["input_ids"] == [pair]
    assert tokenizer("Save", tokenizer.tokenize("Save"))["input_ids"] == pair
    assert tokenizer.encode("Save", "Save") == pair
    empty = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert tokenizer([])["input_ids"] == []
    assert tokenizer("")["input_ids"] == tokenizer([], is_split_into_words=True)["input_ids"] == empty
    assert tokenizer(["", []], padding=True)["input_ids"] == [empty, empty]
    tensors = tokenizer("Save", return_tensors="np")["input_ids"]
    assert np.array_equal(tensors, [one])
    assert torch.equal(tokenizer(["Save"], return_tensors="pt")["input_ids"], torch.tensor([one]))


def test_lengths(tokenizer):
    # As 4.57.6: an example alone counts its padding, one of a batch does not.
    assert tokenizer("a", padding="max_length", max_length=6, return_length=True)["length"] == 6
    assert tokenizer(["a", "b c"], padding="max_length", max_length=6, return_length=True)["length"] == [3, 4]


def test_fields_without_special_tokens(tokenizer):
    fields = dict.fromkeys(["return_token_type_ids", "return_special_tokens_mask", "return_offsets_mapping"], True)
    encoding = tokenizer("Save", "a b", add_special_tokens=False, **fields)
    assert encoding["input_ids"] == tokenizer.convert_tokens_to_ids(["▁S", "ave", "▁a", "▁b"])
    assert encoding["token_type_ids"] == [0, 0, 1, 1]  # 4.57.6 raises
    assert encoding["special_tokens_mask"] == [0] * 4
    assert encoding["offset_mapping"] == [(0, 1), (1, 4), (0, 1), (2, 3)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mask_is_returned_and_is_0_at_padding(golden, side):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, padding_side=side)
    texts = golden["some"]["texts"]
    plain, padded = tokenizer(texts), tokenizer(texts, padding=True, return_tensors="pt")
    assert list(plain) == list(padded) == ["input_ids", "attention_mask"]
    longest = max(map(len, plain["input_ids"]))
    for row, ids in enumerate(plain["input_ids"]):
        assert plain["attention_mask"][row] == [1] * len(ids)
        padding, mask = [0] * (longest - len(ids)), [1] * len(ids)
        assert padded["attention_mask"][row].tolist() == (mask + padding if side == "right" else padding + mask)
        assert padded["input_ids"][row, padded["attention_mask"][row] == 1].tolist() == ids
    words = tokenizer([["Save", "a b"], ["x"]], is_split_into_words=True, padding=True)
    assert list(map(sum, words["attention_mask"])) == [6, 3]
    assert tokenizer("Save")["attention_mask"] == [1] * 4
    assert tokenizer([])["attention_mask"] == []
    assert list(tokenizer(texts, return_attention_mask=False)) == ["input_ids"]


def test_rows_padded_without_masks_get_those_that_the_model_would_make(tokenizer):
    features = [{"input_ids": [0, 11, 2, 1, 1]}, {"input_ids": [0, 11, 12, 13, 14, 2]}]
    expected = [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert DataCollatorWithPadding(tokenizer)(features)["attention_mask"].tolist() == expected
    assert list(tokenizer.pad(features, return_attention_mask=False)) == ["input_ids"]
    assert tokenizer.pad(features[0], padding=False)["attention_mask"] == [1, 1, 1, 0, 0]


def test_model_input_names_are_obeyed_and_saved(tmp_path):
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, model_input_names=["input_ids", "token_type_ids"])
    tokenizer.save_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert list(tokenizer("Save")) == list(loaded("Save")) == ["input_ids", "token_type_ids"]
    ErnieMTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    assert list(ErnieMTokenizer.from_pretrained(tmp_path)("Save")) == ["input_ids", "attention_mask"]


def collate_choices(tokenizer, features):
    """DataCollatorForMultipleChoice, for two examples of two choices each."""
    examples = [{name: [feature[name]] * 2 for name in feature} | {"label": 0} for feature in features]
    batch = DataCollatorForMultipleChoice(tokenizer)(examples)
    return {name: batch[name][:, 1] for name in features[0]}


COLLATORS = {
    "pad": lambda tokenizer, features: tokenizer.pad(features, return_tensors="pt"),
    "pad without a new mask": lambda tokenizer, features: tokenizer.pad(
        features, return_attention_mask=False, return_tensors="pt"
    ),
    "padding": lambda tokenizer, features: DataCollatorWithPadding(tokenizer)(features),
    "tokens": lambda tokenizer, features: DataCollatorForTokenClassification(tokenizer)(
        [feature | {"labels": [5] * len(feature["input_ids"])} for feature in features]
    ),
    "language model": lambda tokenizer, features: DataCollatorForLanguageModeling(tokenizer, mlm_probability=1e-9)(
        features
    ),
    "choices": collate_choices,
}


def test_the_collator_that_packs_leaves_masks_out(tokenizer):
    features = [tokenizer("Save"), tokenizer("a b")]
    batch = DataCollatorWithFlattening()(features)
    assert batch["input_ids"].tolist() == [features[0]["input_ids"] + features[1]["input_ids"]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("names", [["input_ids", "attention_mask"], ["input_ids"]], ids=["mask", "ids_alone"])
def test_zeros_in_a_mask_survive_every_collator(collator, side, names):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, padding_side=side, model_input_names=names)
    features = [
        {"input_ids": [0, 11, 12, 2], "attention_mask": [1, 1, 0, 1]},
        {"input_ids": [0, 15, 2], "attention_mask": [1, 0, 1]},
    ]
    batch = COLLATORS[collator](tokenizer, features)
    assert batch["input_ids"].tolist() == [[0, 11, 12, 2], [0, 15, 2, 1] if side == "right" else [1, 0, 15, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 1], [1, 0, 1, 0] if side == "right" else [0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "text and text_pair must be strings.* not 5"),
        (([None],), r"not \[?None"),
        ((["a", 5],), "not 5"),
        (([1, "a"],), r"not \[1, 'a'\]"),
        (([["a", "b", "c"]],), "of 3 texts: .* is_split_into_words=True"),
        ((["a"], ["b", "c"]), "text_pair must be a list as long as text, of 1 texts"),
        ((["a"], "b"), "text_pair must be a list as long as text"),
    ],
)
def test_errors_name_what_is_wrong_with_the_input(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(*arguments)


def test_errors_of_methods(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"return_offsets_mapping=True and .* need text, not the ids \[7, 8\]: pass"):
        tokenizer([7, 8], return_offsets_mapping=True)
    with pytest.raises(TypeError, match="text must be a string, not 3"):
        tokenizer.tokenize(3)
    with pytest.raises(ValueError, match="token_ids_1 must be None with already_has_special_tokens=True"):
        tokenizer.get_special_tokens_mask([1], [2], already_has_special_tokens=True)
    with pytest.raises(NotADirectoryError, match=r"save_directory='.*nowhere' is not a directory: create it"):
        tokenizer.save_vocabulary(str(tmp_path / "nowhere"))


def test_clean_text_makes_full_width_forms_ascii(tokenizer):
    full_width = "".join(map(chr, range(0xFF01, 0xFF5F)))
    ascii_forms = "".join(map(chr, range(0x21, 0x7E)))
    assert tokenizer.clean_text(full_width) == ascii_forms + "～"  # noqa: RUF001
    others = "".join(chr(code) for code in range(0x3100) if code != 0xFF)
    assert tokenizer.clean_text(others) == others


def test_sampling_varies_the_pieces_and_keeps_the_text(texts):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"enable_sampling": True, "alpha": 0.3})
    plain = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)
    for text in texts[:200:10]:
        samples = {tuple(tokenizer.tokenize(text)) for _ in range(20)}
        assert {"".join(sample).replace("▁", "") for sample in samples} == {
            "".join(plain.tokenize(text)).replace("▁", "")
        }
        assert len(samples) > 1
        check_sampled_spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        assert len(check_sampled_spans["input_ids"]) == len(check_sampled_spans["offset_mapping"])


def test_sampling_of_a_batch_differs_from_call_to_call(texts):
    """SentencePiece's threads begin at the seed in every batch: a text would be cut the same way in every epoch."""
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"enable_sampling": True, "num_threads": 2})
    batch = texts[:1000]
    sentencepiece.set_random_generator_seed(0)
    first, second = tokenizer(batch)["input_ids"], tokenizer(batch)["input_ids"]
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 200
    sentencepiece.set_random_generator_seed(0)
    assert tokenizer(batch)["input_ids"] == first


@pytest.mark.parametrize(
    ("kwargs", "alpha", "nbest_size"),
    [({}, 0.1, 64), ({"alpha": 0.0}, 0.0, 64), ({"alpha": 0.4, "nbest_size": -1}, 0.4, -1)],
)
def test_sampling_arguments(kwargs, alpha, nbest_size):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"enable_sampling": True, **kwargs})
    tokenizer.sp_model = spy = SpyProcessor(tokenizer.sp_model)
    tokenizer.tokenize("Save")
    sampling = {"enable_sampling": True, "alpha": alpha, "nbest_size": nbest_size}
    assert spy.calls == [("Save", {"out_type": str, **sampling})]
