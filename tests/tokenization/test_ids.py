"""Ids, tokens and texts are those of transformers 4.57.6."""

import inspect
import sys
import unicodedata

import pytest

from erniem_fast import ErnieMTokenizer
from tests.tokenization.tiny import ADDED_TOKENS, MODEL_FILE, with_flags


def test_every_real_text_has_the_ids_and_tokens_of_4_57_6(tokenizer, golden, texts):
    assert len(texts) == len(golden["texts"]["tokens"]) > 8000
    assert tokenizer(texts)["input_ids"] == golden["texts"]["input_ids"]
    assert [" ".join(tokenizer.tokenize(text)) for text in texts] == golden["texts"]["tokens"]


def test_lower_casing_of_every_real_text(lower, golden, texts):
    assert [" ".join(lower.tokenize(text)) for text in texts] == golden["texts_lower"]["tokens"]


def test_odd_texts(tokenizer, lower, extended, golden):
    odd = golden["odd"]
    assert len(odd["texts"]) > 800
    assert [tokenizer.tokenize(text) for text in odd["texts"]] == odd["tokens"]
    assert tokenizer(odd["texts"])["input_ids"] == odd["input_ids"]
    assert [lower.tokenize(text) for text in odd["texts"]] == odd["lower_tokens"]
    assert [extended.tokenize(text) for text in odd["texts"]] == odd["extended_tokens"]


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("default", {}),
        ("padded", {"padding": True}),
        ("padded_left", {"padding": "max_length", "max_length": 16, "truncation": True, "padding_side": "left"}),
        (
            "every_field",
            {"return_attention_mask": True, "return_token_type_ids": True, "return_special_tokens_mask": True},
        ),
        ("no_special_tokens", {"add_special_tokens": False}),
    ],
)
def test_calls(tokenizer, golden, key, arguments):
    arguments = {"return_attention_mask": False} | arguments
    assert dict(tokenizer(golden["some"]["texts"], **arguments)) == golden["some"][key]


@pytest.mark.parametrize(
    ("key", "start", "arguments"),
    [
        ("every_field", 0, {}),
        ("truncated", 0, {"truncation": True, "max_length": 12, "padding": "max_length"}),
        ("only_second", -9, {"truncation": "only_second", "max_length": 80, "stride": 2}),
    ],
)
def test_pairs(tokenizer, golden, key, start, arguments):
    fields = ("return_attention_mask", "return_token_type_ids", "return_special_tokens_mask")
    arguments = arguments | dict.fromkeys(fields, key != "only_second")
    pairs = golden["pairs"]
    assert dict(tokenizer(pairs["firsts"][start:], pairs["seconds"][start:], **arguments)) == pairs[key]


def test_text_from_ids_and_tokens(tokenizer, golden):
    some = golden["some"]
    ids = some["default"]["input_ids"]
    assert [tokenizer.decode(one) for one in ids] == some["decoded"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == some["decoded_skip_special_tokens"]
    assert [tokenizer.convert_ids_to_string(one) for one in ids] == some["ids_to_string"]
    tokens = [tokenizer.tokenize(text) for text in some["texts"]]
    assert [tokenizer.convert_tokens_to_string(one) for one in tokens] == some["tokens_to_string"]
    assert tokenizer.convert_ids_to_tokens([99999, 5]) == ["[UNK]", "en"]
    masks = [tokenizer.get_special_tokens_mask(one, already_has_special_tokens=True) for one in ids]
    assert masks == [
        [special or index == tokenizer.pad_token_id for special, index in zip(mask, one, strict=True)]  # 0 in 4.57.6
        for mask, one in zip(some["special_tokens_mask"], ids, strict=True)
    ]


def test_without_a_vocabulary_ids_are_those_of_sentencepiece(golden):
    tokenizer, bare = ErnieMTokenizer(MODEL_FILE), golden["bare"]
    assert (len(tokenizer), tokenizer.vocab_size) == (bare["length"], bare["vocab_size"])
    assert dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) == bare["special_ids"]
    assert [tokenizer(text)["input_ids"] for text in bare["texts"]] == bare["input_ids"]
    # 4.57.6 gives None for what the model does not know.
    assert tokenizer("\u0bf5", add_special_tokens=False)["input_ids"][-1] == tokenizer.unk_token_id
    assert tokenizer.unk_token_id >= tokenizer.vocab_size


def test_added_tokens(extended, golden):
    assert extended.get_added_vocab() == golden["extended"]["added_vocab"]
    assert extended(golden["extended"]["texts"])["input_ids"] == golden["extended"]["input_ids"]
    assert extended.get_vocab()["日本"] == len(extended) - 1 == extended.vocab_size + 2


@pytest.mark.parametrize(("text", "tokens", "decoded", "lower_tokens"), ADDED_TOKENS)
def test_added_tokens_that_strip_or_want_a_word_of_their_own(text, tokens, decoded, lower_tokens):
    tokenizer = with_flags()
    assert " ".join(tokenizer.tokenize(text)) == tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == decoded
    assert " ".join(with_flags(do_lower_case=True).tokenize(text)) == lower_tokens
    assert not {"<ent>", "ErnieM"} & set(tokenizer.tokenize("ErnieM <ent>", split_special_tokens=True))


# What transformers 4.57.6 made of these pieces of a text.
CUTS = [
    ("▁ab12cd", "▁ab 12 cd"),
    ("2▁a", "2▁a"),
    ("a▁2", "a▁ 2"),
    ("▁2▁3,", "2▁ 3 ,"),
    ("▁《▁", "《 ▁"),
    ("《▁|x", "《 ▁ x"),
    ("▁|a|▁|▁b|▁|c", "a ▁b ▁ c"),
    ("▁x❶y²z", "▁x ❶ y ² z"),
    ("▁中a文b", "中 a 文 b"),
    ("▁a|▁|《", "▁a ▁ 《"),
    ("a.5,▁7", "a . 5 , 7"),
    ("▁٣x", "٣ x"),
]


@pytest.mark.parametrize(("pieces", "tokens"), CUTS)
def test_pieces_are_cut_at_ideographs_punctuation_and_digits(tokenizer, pieces, tokens):
    assert " ".join(tokenizer._cut_pieces(pieces.split("|"))) == tokens


def test_signature_and_class_attributes():
    parameters = list(inspect.signature(ErnieMTokenizer).parameters.values())
    special = [("unk_token", "[UNK]"), ("sep_token", "[SEP]"), ("pad_token", "[PAD]"), ("cls_token", "[CLS]")]
    assert [(p.name, p.default) for p in parameters[:-1]] == [
        ("sentencepiece_model_ckpt", inspect.Parameter.empty),
        ("vocab_file", None),
        ("do_lower_case", False),
        ("encoding", "utf8"),
        *special,
        ("mask_token", "[MASK]"),
        ("sp_model_kwargs", None),
        ("pretokenization", "transformers"),
    ]
    files = {"vocab_file": "vocab.txt", "sentencepiece_model_ckpt": "sentencepiece.bpe.model"}
    assert ErnieMTokenizer.vocab_files_names == files
    files = {"vocab_file": "vocab.txt", "sentencepiece_model_file": "sentencepiece.bpe.model"}
    assert ErnieMTokenizer.resource_files_names == files
    assert ErnieMTokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_special_token_layout(tokenizer):
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert tokenizer.build_inputs_with_special_tokens([7, 8]) == [cls, 7, 8, sep]
    assert tokenizer.build_inputs_with_special_tokens([7, 8], [9]) == [cls, 7, 8, sep, sep, 9, sep]
    assert tokenizer.create_token_type_ids_from_sequences([7, 8]) == [0] * 4
    assert tokenizer.create_token_type_ids_from_sequences([7, 8], [9]) == [0, 0, 0, 1, 1, 1, 1]
    assert tokenizer.get_special_tokens_mask([7, 8], [9]) == [1, 0, 0, 1, 1, 0, 1]
    assert tokenizer.build_offset_mapping_with_special_tokens([(1, 2)]) == [(0, 0), (1, 2), (0, 0)]
    spans = tokenizer.build_offset_mapping_with_special_tokens([(1, 2)], [(3, 4)])
    assert spans == [(0, 0), (1, 2), (0, 0), (0, 0), (3, 4), (0, 0)]
    for pair in (False, True):
        example = tokenizer.build_inputs_with_special_tokens([], [] if pair else None)
        assert tokenizer.num_special_tokens_to_add(pair) == len(example)


def test_kinds_of_characters(tokenizer):
    characters = list(map(chr, range(sys.maxunicode + 1)))
    assert sum(map(tokenizer.is_ch_char, characters)) == 0xA000 - 0x4E00
    assert sum(map(tokenizer.is_alpha, characters)) == 52
    assert "".join(filter(tokenizer.is_punct, characters)) == "!,.:;?~。《》【】！，：；？"  # noqa: RUF001
    spaces = {character for character in characters if unicodedata.category(character) == "Zs"}
    assert set(filter(tokenizer.is_whitespace, characters)) == spaces | set("\t\n\r")
