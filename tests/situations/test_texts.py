"""Situations of texts: none, odd spellings, added tokens, pipelines."""

import copy
import shutil

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, pipeline

from erniem_fast import ErnieMForSequenceClassification, ErnieMForTokenClassification, ErnieMModel, ErnieMTokenizer
from tests.golden import cases
from tests.model.tiny import ATOL, assert_close, load
from tests.situations.truths import TEXTS


def test_texts_without_tokens(tokenizer):
    """Alone and beside others; whatever they are made of."""
    empty = ["", "  ", "\n", "\t \r\n", "\u200b", "\ufeff", "\u3000", "\ud800"]
    batch = tokenizer([*TEXTS, *empty], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1)[len(TEXTS) :].eq(2).all()
    with torch.no_grad():
        outputs, alone = load()(**batch), load()(**tokenizer("", return_tensors="pt"))
    for row in range(len(TEXTS), len(TEXTS) + len(empty)):
        assert_close(outputs.last_hidden_state[row, :2], alone.last_hidden_state[0])
        assert_close(outputs.pooler_output[row], alone.pooler_output[0])


def test_spellings_of_the_same_text(tokenizer):
    """Line ends and tabs are spaces; composed and decomposed characters, wide and narrow ones, are the same."""
    for text, others in (
        ("a b", ["a\nb", "a\r\nb", "a\tb", " a \n\n b ", "a\u00a0b", "a\u2003b", "a\u2028b"]),
        ("\u00e9", ["e\u0301"]),
        ("\u30ac", ["\uff76\uff9e", "\u30ab\u3099"]),
        ("ABC 12", ["\uff21\uff22\uff23\u3000\uff11\uff12"]),
    ):
        for other in others:
            assert tokenizer(other)["input_ids"] == tokenizer(text)["input_ids"], other


def test_no_padding_is_predicted(tokenizer):
    """Nor [CLS] or [SEP], whether the rows come with a mask of special tokens or without."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1 - 1e-9)
    for options in ({}, {"return_special_tokens_mask": True}):
        rows = [tokenizer(text, **options) for text in TEXTS]
        batch = collator([{name: row[name] for name in row if options or name == "input_ids"} for row in rows])
        words = batch["attention_mask"].bool()
        for row, mask in zip(rows, words, strict=True):
            mask[[0, len(row["input_ids"]) - 1]] = False
        assert torch.equal(batch["labels"] != -100, words)
        plain = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")["input_ids"]
        assert torch.equal(batch["labels"][words], plain[words])
        assert torch.equal(batch["input_ids"][~words], plain[~words])


def test_kinds_of_ids(tokenizer):
    """Decoded, and padded by collators: lists, arrays and tensors alike."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    texts = [tokenizer.decode(row) for row in rows]
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for kind in (list, np.array, torch.tensor, lambda row: np.array(row, dtype=np.int32)):
        assert [tokenizer.decode(kind(row)) for row in rows] == texts
        features = [{"input_ids": kind(row), "attention_mask": kind([1] * len(row))} for row in rows]
        batch = DataCollatorWithPadding(tokenizer)(features)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert tokenizer.batch_decode(torch.tensor(rows[:1])) == texts[:1]
    assert tokenizer(np.str_(TEXTS[0]))["input_ids"] == rows[0]
    assert tokenizer(tuple(TEXTS))["input_ids"] == rows


def test_added_tokens_from_the_tokenizer_to_the_model(tmp_path):
    """Saved after the files that they came from are gone; the table is widened to a round number of rows."""
    shutil.copytree(cases.TINY, tmp_path / "old")
    tokenizer = ErnieMTokenizer.from_pretrained(tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    tokenizer.add_tokens(["<e1>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e2>"]})
    tokenizer.save_pretrained(tmp_path)
    loaded, text = ErnieMTokenizer.from_pretrained(tmp_path), "a <e1>b <e2>c"
    batch = loaded(text, return_tensors="pt")
    assert batch["input_ids"].tolist() == [tokenizer(text)["input_ids"]] == [copy.deepcopy(loaded)(text)["input_ids"]]
    assert {2300, 2301} < set(batch["input_ids"][0].tolist())
    assert loaded.decode(batch["input_ids"][0], skip_special_tokens=True) == "a <e1> b c"
    model = load()
    model.resize_token_embeddings(len(loaded), pad_to_multiple_of=64)
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path).eval()
    assert again.config.vocab_size == 2304
    assert_close(again(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_spans_in_a_pipeline(tokenizer):
    model = load(ErnieMForTokenClassification, num_labels=3)
    options = {"ignore_labels": [], "aggregation_strategy": "simple"}
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", **options)
    for text in TEXTS:
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        labels = model(**tokenizer(text, return_tensors="pt")).logits[0, 1:-1].argmax(-1).tolist()
        found = tag(text)
        groups = [place for place in range(len(labels)) if place == 0 or labels[place] != labels[place - 1]]
        for group, start, end in zip(found, groups, [*groups[1:], len(labels)], strict=True):
            assert group["entity_group"] == f"LABEL_{labels[start]}"
            assert (group["start"], group["end"]) == (spans[1 + start][0], spans[end][1])


def test_a_pipeline_of_long_texts(tokenizer):
    """Cut to 512 tokens if it is asked to, and otherwise refused by name."""
    model, text = load(ErnieMForSequenceClassification), "password " * 900
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    (found,) = classify(text, truncation=True)
    cut = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
    assert cut["input_ids"].shape == (1, 512)
    assert found["score"] == pytest.approx(model(**cut).logits.softmax(-1).max().item(), abs=ATOL)
    with pytest.raises(ValueError, match=r"902, but .*512 tokens; truncate to max_length=512"):
        classify(text)
