"""Spans of tokens in the text, and the offset mapping of a call."""

import random
import re

import pytest
from transformers import DataCollatorWithPadding

from erniem_fast import ErnieMTokenizer
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE, with_flags


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("日本語：ab 12c", "日 0 1, 本 1 2, 語 2 3, : 3 4, ab 4 6, 1 7 8, 2 8 9, c 9 10"),  # noqa: RUF001
        (
            " Save  ½ ㍿!",
            "▁S 1 2, ave 2 5, 1 7 8, \u2044 7 8, 2 7 8, ▁ 9 10, 株 9 10, 式 9 10, 会 9 10, 社 9 10, ! 10 11",
        ),
        ("e\u0301x ﬁx", "▁é 0 2, x 2 3, ▁f 4 5, i 4 5, x 5 6"),
        ("a\ud800b", "▁a 0 1, ▁b 2 3"),
        ("a\x00 b", "▁a 0 1, \x00 1 2, ▁b 3 4"),
        ("x\u3000《", "▁x 0 1, ▁ 2 3, 《 2 3"),
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
        elif token != "▁":
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
    assert keeps_spaces.get_offset_mapping(" a  b ") == [(0, 1), (1, 2), (3, 4), (4, 5)]


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
    with pytest.raises(ValueError, match=r"leave add_bos, .* out of sp_model_kwargs, and"):
        tokenizer.get_offset_mapping("Hello")


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
