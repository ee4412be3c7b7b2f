"""Fixtures that tests of the tokenizer share."""

import io
import json
import lzma

import pytest
import sentencepiece

from erniem_fast import ErnieMTokenizer
from tests import ROOT
from tests.golden.cases import GOLDEN, TINY
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE


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
