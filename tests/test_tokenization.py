"""ErnieMTokenizer against what transformers 4.57.6 computed (golden/README.md), and what 4.57.6 could not do."""

import inspect
import io
import json
import lzma
import os
import pathlib
import pickle
import random
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)

from erniem_fast import ErnieMTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
ROOT = GOLDEN.parents[1]
MODEL_FILE, VOCAB_FILE = str(TINY / "sentencepiece.bpe.model"), str(TINY / "vocab.txt")


@pytest.fixture(scope="module")
def golden():
    with lzma.open(GOLDEN / "tokenizer.json.xz") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def texts():
    """Every distinct text of parallel.tsv, in the order of the golden's `texts`."""
    lines = (ROOT / "bench/data/parallel.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    return list(dict.fromkeys([row[1] for row in rows] + [row[2] for row in rows]))


@pytest.fixture(scope="module")
def tokenizer():
    return ErnieMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def lower():
    return ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, do_lower_case=True)


@pytest.fixture(scope="module")
def extended():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, additional_special_tokens=["<ent>"])
    tokenizer.add_tokens(["ErnieM", "日本"])
    return tokenizer


def with_flags(**kwargs):
    """A tokenizer whose added tokens have every property that an added token can have."""
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, additional_special_tokens=["<ent>"], **kwargs)
    tokenizer.add_tokens(
        [
            AddedToken("ErnieM", lstrip=True, rstrip=True),
            AddedToken("RR", rstrip=True),
            AddedToken("ab", single_word=True),
            AddedToken("QuX", normalized=False),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def keeps_spaces(tmp_path_factory):
    """A tokenizer whose SentencePiece model keeps the spaces at a text's ends."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four", "a b c d e f"] * 9),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("keeps_spaces") / "sentencepiece.bpe.model"
    path.write_bytes(model.getvalue())
    return ErnieMTokenizer(str(path))


# ---- Equal to 4.57.6


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


# What transformers 4.57.6 computed: text, tokens, decoded ids, and tokens with do_lower_case=True.
ADDED_TOKENS = [
    ("a  ErnieM  b", "▁a ErnieM ▁b", "[CLS] a ErnieM b[SEP]", "▁a erniem ▁b"),
    ("a\x85ErnieM\x85b", "▁a ErnieM ▁b", "[CLS] a ErnieM b[SEP]", "▁a erniem ▁b"),
    ("a\x85RR\x85b", "▁a \x85 RR ▁b", "[CLS] a[UNK] RR b[SEP]", "▁a \x85 rr ▁b"),
    ("ERNIEM c", "▁E R N I E M ▁c", "[CLS] E[UNK][UNK][UNK][UNK][UNK] c[SEP]", "erniem ▁c"),
    ("cab ab abc ab", "▁c ab ab ▁ab c ab", "[CLS] c ab ab abc ab [SEP]", "▁c ab ab ▁ab c ab"),
    ("xab<ent>ab", "▁x ab < ent > ab", "[CLS] x ab [UNK]ent[UNK] ab [SEP]", "▁x ab < ent > ab"),
    ("QuX qux", "QuX ▁qu x", "[CLS] QuX qux[SEP]", "▁qu x ▁qu x"),
    ("<ENT> <ent>Hi", "< E N T > <ent> ▁H i", "[CLS][UNK][UNK][UNK][UNK][UNK] <ent> Hi[SEP]", "<ent> <ent> ▁h i"),
    ("İ [MASK]A", "▁İ [MASK] ▁A", "[CLS] İ[MASK] A[SEP]", "▁i ̇ [MASK] ▁a"),
]


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


# ---- Spans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("日本語：ab 12c", "日 0 1, 本 1 2, 語 2 3, : 3 4, ab 4 6, 1 7 8, 2 8 9, c 9 10"),  # noqa: RUF001
        (
            " Save  ½ ㍿!",
            "▁S 1 2, ave 2 5, 1 7 8, \u2044 7 8, 2 7 8, ▁ 8 9, 株 9 10, 式 9 10, 会 9 10, 社 9 10, ! 10 11",
        ),
        ("e\u0301x ﬁx", "▁é 0 2, x 2 3, ▁f 4 5, i 4 5, x 5 6"),
        ("a\ud800b", "▁a 0 1, ▁b 2 3"),
        ("a\x00 b", "▁a 0 1, \x00 1 2, ▁b 3 4"),
        ("x\u3000《", "▁x 0 1, ▁ 1 2, 《 2 3"),
        ("👩‍👩‍👧 ok", "👩‍👩‍👧 0 5, ▁o 6 7, k 7 8"),
        ("a  ErnieM  b", "▁a 0 1, ErnieM 3 9, ▁b 11 12"),
        ("c ab x", "▁c 0 1, ab 2 4, ▁x 5 6"),
        ("", ""),
        ("  ", ""),
        ("▁", ""),
    ],
)
def test_spans_of_chosen_texts(text, expected):
    tokenizer = with_flags()
    tokens, spans = tokenizer.tokenize(text), tokenizer.get_offset_mapping(text)
    assert ", ".join(f"{token} {start} {end}" for token, (start, end) in zip(tokens, spans, strict=True)) == expected


def test_spans_where_lower_case_is_longer(lower):
    assert lower.tokenize("İSAVE") == ["▁i", "\u0307", "s", "ave"]
    assert lower.get_offset_mapping("İSAVE") == [(0, 1), (0, 1), (1, 2), (2, 5)]
    assert lower.get_offset_mapping(None) is None


RANGES = [(0, 0x80), (0x80, 0x2000), (0x300, 0x370), (0x2000, 0x3100), (0x4E00, 0xA000), (0xD800, 0xE000)]
RANGES += [(0xF900, 0x10000), (0x1F300, 0x1FA00), (0, 0x110000)]
ODD = ["ﬁ", "㍿", "½", "ﷺ", "①", "²", "İ", "ẞ", "e\u0301", "カ\u3099", "ｶﾞ", "\x7f", "\xad", "\ufeff", "\u200b"]
ODD += [
    "👩‍👩‍👧",
    "[CLS]",
    "[MASK]",
    "[cls",
    "<ent>",
    "ErnieM",
    "erniem",
    "ab",
    "QuX",
    "12",
    ",",
    "\uff0c",
    "▁",
    " ",
    "  ",
    "\n",
]


def random_texts(count, seed):
    """Strings of characters from all over Unicode, unpaired surrogates and unassigned ones included."""
    generator = random.Random(seed)
    for _ in range(count):
        ranges = generator.sample(RANGES, 3)
        parts = [chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(20))]
        parts += generator.choices(ODD, k=generator.randrange(12))
        generator.shuffle(parts)
        yield "".join(parts)


def check_spans(tokenizer, text):
    """Asserts that every token's span is where it came from, and that no text is left over."""
    tokens, spans = tokenizer.tokenize(text), tokenizer.get_offset_mapping(text)
    assert len(tokens) == len(spans)
    rest, last_start, last_end = list(text), 0, 0
    for token, (start, end) in zip(tokens, spans, strict=True):
        assert last_start <= start < end <= len(text)
        assert last_end <= end
        last_start, last_end = start, end
        rest[start:end] = " " * (end - start)
        source = re.sub("[\ud800-\udfff]", "\ufffd", text[start:end])
        if tokenizer.do_lower_case and token not in tokenizer.all_special_tokens:
            source = "".join(map(str.lower, source))
        if token in tokenizer.get_added_vocab():
            assert source == token
        elif token == "▁":
            assert " " in unicodedata.normalize("NFKC", source) or not tokenizer.sp_model.normalize(source)
        else:
            assert token.strip("▁") in tokenizer.sp_model.normalize(source)
    if not any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        assert tokenizer.tokenize("".join(rest)) == []


@pytest.mark.parametrize("options", [{}, {"do_lower_case": True}], ids=["cased", "lower"])
def test_no_string_raises_and_every_span_is_right(options, golden):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, **options)
    tokenizer.add_tokens(["ErnieM", "<ent>"])
    for text in [*random_texts(2500, seed=1), *golden["odd"]["texts"]]:
        check_spans(tokenizer, text)


def test_spans_beside_added_tokens_that_strip():
    tokenizer = with_flags()
    for text in random_texts(800, seed=2):
        check_spans(tokenizer, text)


def test_spans_of_real_texts(tokenizer, texts):
    for text in texts[::9]:
        check_spans(tokenizer, text)


def test_spans_where_spaces_are_kept(keeps_spaces):
    assert keeps_spaces.tokenize(" a  b ") == ["▁", "a", "▁", "b"]
    assert keeps_spaces.get_offset_mapping(" a  b ") == [(0, 1), (1, 2), (2, 3), (4, 5)]


def test_a_trailing_lone_space_is_no_token(keeps_spaces):
    """4.57.6 raises IndexError here."""
    assert keeps_spaces.sp_model.encode("one ", out_type=str)[-1] == "▁"
    assert keeps_spaces.tokenize("one ") == keeps_spaces.tokenize("one")
    assert keeps_spaces.tokenize(" ") == []


def test_long_texts(tokenizer):
    text = "Hello, world 12 日本語 ½ " * 4000 + "\U000c42e3" * 5000
    tokens, spans = tokenizer.tokenize(text), tokenizer.get_offset_mapping(text)
    assert len(tokens) == len(spans) == 4000 * len(tokenizer.tokenize("Hello, world 12 日本語 ½")) + 2
    assert spans[-1] == (len(text) - 5000, len(text))


def test_spans_need_pieces_that_spell_the_text():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"add_bos": True})
    with pytest.raises(ValueError, match=r"leave add_bos, .* out of sp_model_kwargs=\{'add_bos': True\}"):
        tokenizer.get_offset_mapping("Hello")


# ---- Offset mapping of a call


def test_offset_mapping_of_a_call(tokenizer):
    text = "Save  ½ km"
    expected = [(0, 0), *tokenizer.get_offset_mapping(text), (0, 0)]
    for encoding in (
        tokenizer(text, return_offsets_mapping=True),
        tokenizer.encode_plus(text, return_offsets_mapping=1),
    ):
        assert list(encoding) == ["input_ids", "offset_mapping", "attention_mask"]
        assert encoding["offset_mapping"] == expected
    assert tokenizer.batch_encode_plus([text], return_offsets_mapping=True)["offset_mapping"] == [expected]
    bare = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert bare["offset_mapping"] == expected[1:-1]
    assert "offset_mapping" not in tokenizer(text)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_offset_mapping_of_truncated_and_padded_pairs(golden, side, strategy):
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, truncation_side=side, padding_side=side)
    tokenizer.add_tokens(["日本"])
    firsts, seconds = (golden["pairs"][name] for name in ("firsts", "seconds"))
    plain = tokenizer(firsts, seconds)["input_ids"]
    pairs = [pair for pair, ids in zip(zip(firsts, seconds, strict=True), plain, strict=True) if len(ids) > 8]
    fields = dict.fromkeys(["return_token_type_ids", "return_special_tokens_mask", "return_offsets_mapping"], True)
    encoding = tokenizer(pairs, truncation=strategy, max_length=24, padding=True, return_tensors="pt", **fields)
    ids, types, special, spans = (
        encoding[name] for name in ("input_ids", "token_type_ids", "special_tokens_mask", "offset_mapping")
    )
    assert spans.shape == (*ids.shape, 2)
    assert spans[special == 1].abs().sum() == 0
    for row, pair in enumerate(pairs):
        for sequence, text in enumerate(pair):
            kept = (special[row] == 0) & (types[row] == sequence)
            found = list(zip(ids[row, kept].tolist(), map(tuple, spans[row, kept].tolist()), strict=True))
            tokens = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
            whole = list(zip(tokens, tokenizer.get_offset_mapping(text), strict=True))
            assert found == (whole[: len(found)] if side == "right" else whole[len(whole) - len(found) :])


def test_offset_mapping_of_words(tokenizer):
    encoding = tokenizer([["Save", "½ km"], ["x"]], is_split_into_words=True, return_offsets_mapping=True)
    words = [tokenizer.get_offset_mapping(word) for word in ("Save", "½ km")]
    assert encoding["offset_mapping"][0] == [(0, 0), *words[0], *words[1], (0, 0)]


def test_offset_mapping_through_a_collator(tokenizer):
    features = [tokenizer(text, return_offsets_mapping=True) for text in ("Save", "Save and add")]
    batch = DataCollatorWithPadding(tokenizer)(features)
    assert batch["offset_mapping"].shape == (*batch["input_ids"].shape, 2)
    assert batch["offset_mapping"][0, len(features[0]["input_ids"]) :].abs().sum() == 0


# ---- Inputs of a call


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


# ---- Attention mask


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
    with pytest.raises(ValueError, match=r"return_offsets_mapping=True needs text, not the ids \[7, 8\]"):
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


# ---- Sampling


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


# ---- Files


def test_a_directory_saved_by_4_57_6_loads_with_auto_tokenizer(tokenizer, golden):
    loaded = AutoTokenizer.from_pretrained(TINY)
    assert type(loaded) is ErnieMTokenizer
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(golden["odd"]["texts"])["input_ids"] == golden["odd"]["input_ids"]


def test_a_directory_from_before_added_tokens_decoder_loads(tokenizer, tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"special_tokens_map_file": None}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 2300}))
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert loaded("Save<new>[MASK]")["input_ids"] == [*tokenizer("Save")["input_ids"][:-1], 2300, 2299, 2]


def test_saving_and_loading(tmp_path, golden):
    saved = with_flags(do_lower_case=True, model_max_length=77, sp_model_kwargs={"num_threads": 1})
    saved.save_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == saved.get_vocab()
    assert (loaded.do_lower_case, loaded.model_max_length, loaded.sp_model_kwargs) == (True, 77, {"num_threads": 1})
    assert loaded.extra_special_tokens == ["<ent>"]
    batch = golden["odd"]["texts"] + [text for text, *_ in ADDED_TOKENS]
    assert loaded(batch)["input_ids"] == saved(batch)["input_ids"]


def test_a_checkpoints_inputs_are_as_long_as_its_positions_allow(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    checkpoint = tmp_path / "subfolder"
    shutil.copytree(TINY, checkpoint)

    def longest(saved, **kwargs):
        (checkpoint / "config.json").write_text(json.dumps(saved))
        return ErnieMTokenizer.from_pretrained(tmp_path, subfolder="subfolder", **kwargs).model_max_length

    assert longest(config) == longest(config, cache_dir=None) == 512
    assert longest(config | {"max_position_embeddings": 130}) == 128
    assert longest({"model_type": "ernie_m"}) == 512
    assert longest({"model_type": "bert", "max_position_embeddings": 512}) > 1e20
    assert longest(config, model_max_length=1000) == 1000
    for rows in (None, "514", 514.0):
        with pytest.raises(ValueError, match=f"max_position_embeddings={rows!r} in the config.json of "):
            longest(config | {"max_position_embeddings": rows})
    # tokenizer_config.json of the checkpoint says 514, then 77.
    ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, model_max_length=514).save_pretrained(checkpoint)
    assert longest(config) == 512
    ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, model_max_length=77).save_pretrained(checkpoint)
    assert longest(config) == 77
    (checkpoint / "config.json").unlink()
    assert ErnieMTokenizer.from_pretrained(checkpoint).model_max_length == 77
    assert ErnieMTokenizer(MODEL_FILE, VOCAB_FILE).model_max_length > 1e20


def test_long_texts_are_truncated_to_what_the_model_reads(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert len(tokenizer("a " * 600, truncation=True)["input_ids"]) == tokenizer.model_max_length == 512
    tokenizer.save_pretrained(tmp_path)
    assert ErnieMTokenizer.from_pretrained(tmp_path).model_max_length == 512


def test_saved_vocabulary_is_what_was_loaded(tokenizer, tmp_path):
    assert tokenizer.save_vocabulary(str(tmp_path)) == (str(tmp_path / "vocab.txt"),)
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    assert tokenizer.save_vocabulary(str(tmp_path), "my") == (str(tmp_path / "my-vocab.txt"),)
    assert (tmp_path / "my-vocab.txt").read_bytes() == (TINY / "vocab.txt").read_bytes()


def test_a_vocabulary_line_is_a_token_with_its_spaces(tokenizer, tmp_path):
    (tmp_path / "vocab.txt").write_text("a\n b \n\n\u3000", encoding="utf-8")
    assert tokenizer.load_vocab(tmp_path / "vocab.txt") == {"a": 0, " b ": 1, "": 2, "\u3000": 3}


def test_saving_keeps_the_ids_of_a_vocabulary_that_repeats_a_token(tmp_path):
    tokens = (TINY / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "repeats.txt").write_text("\n".join([*tokens[:10], *tokens[8:]]) + "\n", encoding="utf-8")
    tokenizer = ErnieMTokenizer(MODEL_FILE, str(tmp_path / "repeats.txt"))
    tokenizer.save_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert {token: loaded.vocab[token] for token in tokens} == tokenizer.vocab
    assert tokenizer.vocab[tokens[-1]] == len(tokens) + 1


def test_a_pickle_needs_no_files(tmp_path, golden):
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        shutil.copy(TINY / name, tmp_path)
    paths = str(tmp_path / "sentencepiece.bpe.model"), str(tmp_path / "vocab.txt")
    tokenizer = ErnieMTokenizer(*paths, sp_model_kwargs={"reverse": True})
    tokenizer.add_tokens(["ErnieM"])
    batch = [*golden["odd"]["texts"], "ErnieM"]
    expected = tokenizer(batch)["input_ids"]
    pickled = pickle.dumps(tokenizer)
    shutil.rmtree(tmp_path)
    assert pickle.loads(pickled)(batch)["input_ids"] == expected


PICKLES = """
import hashlib
import pickle
import sys

from erniem_fast import ErnieMTokenizer

tokenizer = ErnieMTokenizer.from_pretrained(sys.argv[1], additional_special_tokens=["<a>", "<b>", "<c>"])
tokenizer.add_tokens(["ErnieM", "日本", "<d>", "<e>"])
first = pickle.dumps(tokenizer)
second = pickle.dumps(pickle.loads(first))
tokenizer("ErnieM <a> of 日本 " * 200)
for pickled in (first, second, pickle.dumps(tokenizer)):
    print(hashlib.sha256(pickled).hexdigest())
"""


def test_equal_tokenizers_have_equal_pickles_in_every_process():
    """Caches such as those of `datasets` know a tokenizer by a hash of its pickle."""
    command = [sys.executable, "-c", PICKLES, str(TINY)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("0", "1")
    ]
    hashes = [process.communicate(timeout=300)[0].split() for process in processes]
    assert [len(each) for each in hashes] == [3, 3]
    assert len({pickled for each in hashes for pickled in each}) == 1


def test_what_a_tokenizer_has_seen_is_in_its_cache_alone(texts):
    """`datasets` hashes the attributes, not the pickle, and leaves out the one that is called cache."""
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)

    def state():
        return {name: pickle.dumps(value) for name, value in vars(tokenizer).items() if name != "cache"}

    before = state()
    tokenizer(texts[:50])
    assert len(tokenizer.cache) > 100
    assert state() == before


@pytest.mark.parametrize("name", ["vocab.txt", "sentencepiece.bpe.model"])
def test_a_checkpoint_without_a_file_is_refused(tmp_path, name):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    argument = {file: argument for argument, file in ErnieMTokenizer.vocab_files_names.items()}[name]
    message = (
        rf"{argument}: '{re.escape(str(tmp_path))}' holds no {name}: copy it from the checkpoint, or pass its path"
    )
    with pytest.raises(ValueError, match=message):
        ErnieMTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path, **{argument: str(TINY / name)})
    assert loaded.tokenize("Save") == ["▁S", "ave"]


def test_missing_and_broken_files_are_named():
    with pytest.raises(
        FileNotFoundError, match=r"sentencepiece_model_ckpt='no\.model' is not a file: give the path of"
    ):
        ErnieMTokenizer("no.model", VOCAB_FILE)
    with pytest.raises(FileNotFoundError, match=r"vocab_file='no\.txt' is not a file: give the path of vocab\.txt"):
        ErnieMTokenizer(MODEL_FILE, "no.txt")
    with pytest.raises(
        ValueError, match=r"sentencepiece_model_ckpt='.*vocab\.txt' is not a SentencePiece model: copy it"
    ):
        ErnieMTokenizer(VOCAB_FILE, VOCAB_FILE)
    with pytest.raises(ValueError, match=r"vocab_file: 'no\.txt' is not a file: copy it from the checkpoint"):
        ErnieMTokenizer.from_pretrained(TINY, vocab_file="no.txt")
