# ruff: noqa: RUF001
import random

import pytest

from erniem_fast import ErnieMTokenizer
from erniem_fast.extraction import tokens
from tests.extraction.test_hostile import random_text
from tests.golden.cases import TINY


@pytest.mark.parametrize("way", ["transformers", "paddlenlp", "original"])
def test_a_text_in_stretches_has_the_tokens_of_the_whole(monkeypatch, way):
    tokenizer = ErnieMTokenizer.from_pretrained(TINY, pretokenization=way)
    draw = random.Random(0)
    texts = [random_text(draw, 60) for _ in range(150)] + [
        "",
        " ",
        "你好。",
        "a b\n c  d\n\n\u0301e f🙂 g，h [SEP] i [PAD]j k",
    ]
    whole = tokens.tokenize(tokenizer, texts)
    monkeypatch.setattr(tokens, "STRETCH", 3)
    assert sum(len(list(tokens._stretches(text))) for text in texts) > 2 * len(texts)
    assert tokens.tokenize(tokenizer, texts) == whole
    for each in whole:
        assert list(each.starts) == sorted(each.starts)
        assert all(0 <= start <= end <= len(each.text) for start, end in zip(each.starts, each.ends, strict=True))


def test_a_tokenizer_gets_little_text_at_a_time(monkeypatch):
    monkeypatch.setattr(tokens, "STRETCH", 100)
    sizes = []

    class Watched(ErnieMTokenizer):
        def __call__(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return super().__call__(texts, **options)

    long, short = "Log in again, please. " * 50, ["Log in"] * 100
    tokenizer = Watched.from_pretrained(TINY)
    (first, *others) = tokens.tokenize(tokenizer, [long, *short])
    assert len(others) == 100
    monkeypatch.undo()
    assert len(first) == 50 * len(tokens.tokenize(ErnieMTokenizer.from_pretrained(TINY), ["Log in again, please. "])[0])
    assert max(sizes) < 2 * 110
    assert sum(sizes) == len(long) + 600
