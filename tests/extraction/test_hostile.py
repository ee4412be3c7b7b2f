# ruff: noqa: RUF001
"""Random schemas and texts: no crash, and every span is where it says. HOSTILE_CASES sets their number."""

import os
import random
import warnings
import zlib

import pytest

from erniem_fast.extraction import Extractor, tokens
from erniem_fast.extraction.schema import half_width
from tests.extraction.stub import Letters, Stub
from tests.extraction.tiny import load_tokenizer

COUNT = int(os.environ.get("HOSTILE_CASES", 30))
PIECES = [
    "a",
    "Log in",
    "password ",
    "，",
    "。",
    "［",
    "]",
    "[",
    "[SEP]",
    "[CLS]",
    "[PAD]",
    "<b>",
    "的",
    " of ",
    "\n",
    "\r\n",
    "\t",
]
PIECES += [
    "　",
    "Ａ",
    "½",
    "ﬁ",
    "e\u0301",
    "😀",
    "👩‍👩‍👧",
    "\ud83d",
    "\udc00",
    "\x00",
    "\u200b",
    "\u202e",
    "▁",
    "ا",
    "हि",
    "1.5",
    "已存在",
]
PIECES += ["名字", "用户", "##", "\ufeff"]


def random_text(draw, most):
    return "".join(draw.choices(PIECES, k=draw.randrange(most)))


def random_name(draw):
    name = random_text(draw, 5).replace("[", "(").replace("［", "(").strip() or "x"
    if draw.random() < 0.2:
        name += "[" + ",".join(f"{number}{draw.choice('ab正')}" for number in range(draw.randint(1, 4))) + "]"
    return name


def random_schema(draw, depth=3):
    kind = draw.randrange(3) if depth else 0
    if kind == 0:
        return random_name(draw)
    if kind == 1:
        items = [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
        return [item for item in items if not isinstance(item, list)] or [random_name(draw)]
    return {random_name(draw): random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))}


def noise(prompt, row):
    """Starts and ends at random places, special tokens included, the same for the same row."""
    draw = random.Random(zlib.crc32(repr(row).encode()))
    return [[draw.randrange(len(row)) for _ in range(2)] for _ in range(2)]


def check(result, text):
    for name, spans in result.items():
        places = [(span["start"], span["end"]) for span in spans if "start" in span]
        assert places == sorted(set(places))
        for span in spans:
            if "start" in span:
                assert 0 <= span["start"] < span["end"] <= len(text)
                assert text[span["start"] : span["end"]] == span["text"]
            else:
                assert span["text"] in half_width(name)[half_width(name).rindex("[") :]
            assert 0.5 < span["probability"] <= 1 or span["probability"] > 0.25
            check(span.get("relations", {}), text)


@pytest.mark.parametrize("letters", [True, False], ids=["letters", "pieces"])
def test_random_schemas_and_texts(monkeypatch, letters):
    draw, tokenizer = random.Random(1), Letters() if letters else load_tokenizer()
    model = Stub(tokenizer, noise)
    monkeypatch.setattr(tokens, "STRETCH", 40)
    for _ in range(COUNT):
        schema, texts = random_schema(draw), [random_text(draw, 60) for _ in range(draw.randint(1, 4))]
        options = {"lang": draw.choice(["zh", "en"]), "split_sentence": draw.random() < 0.5, "progress": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # subjects that are too long for a prompt
            length, overlap = draw.choice([90, 512]), draw.random() < 0.5
            results = Extractor(model, tokenizer, schema, max_length=length, overlap=overlap, **options)(texts)
            Extractor(model, tokenizer, schema, compat=True, **options)(texts)
        assert len(results) == len(texts)
        for result, text in zip(results, texts, strict=True):
            check(result, text)


def test_work_is_linear_in_the_length_of_a_text_and_batches_do_not_grow():
    rows = {}
    for length in (25_000, 50_000, 100_000):
        model = Stub(Letters(), {"x": ["谷"]})
        text = "这是一句话，有二十个字，再加上谷爱凌吧。" * (length // 20)
        (found,) = Extractor(model, Letters(), "x", progress=False)(text)
        assert len(found["x"]) == length // 20
        rows[length] = sum(map(len, model.calls))
        assert all(sum(map(len, call)) <= 8192 for call in model.calls)
    assert rows[100_000] <= 2 * rows[50_000] + 1 <= 4 * rows[25_000] + 3
    assert rows[100_000] < 1.4 * 100_000 / 507
