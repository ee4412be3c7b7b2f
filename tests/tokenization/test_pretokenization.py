"""The ways from pieces to tokens: Baidu's original and PaddleNLP's, against Paddle's own code, and XLM-RoBERTa's."""

import json
import lzma
import shutil
import unicodedata

import pytest
from transformers import AutoTokenizer

from erniem_fast import ErnieMTokenizer
from erniem_fast.pretokenization import WAYS
from tests.golden.cases import GOLDEN, TINY
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE

PADDLE = GOLDEN / "paddle"


def make(way, **options):
    return ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, pretokenization=way, **options)


@pytest.fixture(scope="module")
def paddles():
    with lzma.open(PADDLE / "tokenizer.json.xz") as file:
        return json.load(file)


@pytest.mark.parametrize("way", ["paddlenlp", "original"])
def test_tokens_are_those_of_paddle(paddles, way):
    texts = paddles["texts"]
    assert len(texts) > 300
    tokenizer = make(way)
    found = [tokenizer.tokenize(text, split_special_tokens=True) for text in texts]
    # PaddleNLP 2.3.4 drops characters for private use too, which Baidu's own code, from which it came, keeps.
    private = [any(unicodedata.category(character) in ("Co", "Cn") for character in text) for text in texts]
    expected = [
        tokens if is_private and way == "original" else theirs
        for tokens, theirs, is_private in zip(found, paddles[way], private, strict=True)
    ]
    assert sum(private) == 1
    assert found == expected
    assert tokenizer(texts, split_special_tokens=True)["input_ids"] == [
        tokenizer.build_inputs_with_special_tokens(tokenizer.convert_tokens_to_ids(tokens)) for tokens in found
    ]
    default = make("transformers")
    assert sum(default.tokenize(text) != tokens for text, tokens in zip(texts, found, strict=True)) > 20


def test_characters_for_private_use_are_kept_as_in_baidus_code():
    assert make("original").tokenize("𪛖 \ue000 \U000f0000\u200b") == ["▁", "𪛖", "▁", "\ue000", "▁", "\U000f0000"]


def test_commas_after_digits(paddles):
    tokenizer = ErnieMTokenizer(str(PADDLE / "commas.model"), pretokenization="original")
    assert (
        sum(tokenizer.sp_model.encode(text, out_type=str) != tokens for text, tokens in paddles["commas"].items()) > 2
    )
    for text, tokens in paddles["commas"].items():
        assert tokenizer.tokenize(text) == tokens
        spans = tokenizer.get_offset_mapping(text)
        assert [text[start:end] for start, end in spans] == [token.strip("▁") or "," for token in tokens]


def test_pieces_as_they_are(paddles):
    tokenizer = make("sentencepiece")
    texts = paddles["texts"]
    expected = [tokenizer.sp_model.encode(text, out_type=str) for text in texts]
    assert [tokenizer.tokenize(text, split_special_tokens=True) for text in texts] == expected


@pytest.mark.parametrize("way", WAYS)
def test_offsets(paddles, way):
    """Spans ascend within the text, and hold what their tokens spell where normalisation leaves letters alone."""
    tokenizer = make(way)
    for text in paddles["texts"]:
        spans = tokenizer.get_offset_mapping(text)
        assert len(spans) == len(tokenizer.tokenize(text))
        assert spans == sorted(spans)
        assert all(0 <= start <= end <= len(text) for start, end in spans)
    text = "Say “Log in” \u200bto 12, 在 2019年"
    tokens, spans = tokenizer.tokenize(text), tokenizer.get_offset_mapping(text)
    letters = [(token.strip("▁"), text[start:end]) for token, (start, end) in zip(tokens, spans, strict=True)]
    assert all(token == part for token, part in letters if token.isalnum())
    if way == "original":
        assert letters.count(('"', "“")) == letters.count(('"', "”")) == 1


def test_special_tokens_stay_whole_in_every_way():
    for way in WAYS:
        assert make(way).tokenize("a [MASK] b")[1] == "[MASK]"


def test_the_way_is_saved(tmp_path):
    make("original").save_pretrained(tmp_path)
    for loaded in (ErnieMTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.pretokenization == "original"
        assert loaded.tokenize("“a”, 12,") == make("original").tokenize("“a”, 12,")
    assert ErnieMTokenizer.from_pretrained(tmp_path, pretokenization="paddlenlp").pretokenization == "paddlenlp"
    assert ErnieMTokenizer.from_pretrained(TINY).pretokenization == "transformers"


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match=r"pretokenization='baidu' is unknown; use one of transformers, paddlenlp, "):
        make("baidu")


# ---- Files of Paddle and Baidu


def test_folders_of_paddlenlp_load(tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(PADDLE / "base" / name, tmp_path)
    for path in (MODEL_FILE, VOCAB_FILE):
        shutil.copy(path, tmp_path)
    text = "Save 12, 在 2019年"
    for loaded in (ErnieMTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(text) == make("transformers")(text)
        assert loaded.model_max_length == 18


def test_folders_of_baidu_load(tmp_path):
    """Their vocabulary says ids beside tokens, and their model has another name."""
    tokens = (TINY / "vocab.txt").read_text(encoding="utf-8").splitlines()
    lines = sorted(f"{token}\t{index}\n" for index, token in enumerate(tokens))
    (tmp_path / "vocab.txt").write_text("".join(lines), encoding="utf-8")
    shutil.copy(MODEL_FILE, tmp_path / "piece.model")
    shutil.copy(PADDLE / "baidu/ernie_config.json", tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path, pretokenization="original")
    assert loaded.get_vocab() == make("original").get_vocab()
    assert loaded("Save “it”") == make("original")("Save “it”")
    assert loaded.model_max_length == 18
