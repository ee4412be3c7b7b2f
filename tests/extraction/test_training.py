# ruff: noqa: RUF001
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from erniem_fast import ErnieMForInformationExtraction
from erniem_fast.extraction import (
    AnnotatedText,
    Answer,
    Entity,
    Example,
    ExtractionCollator,
    Relation,
    extract,
    make_examples,
    make_features,
    read_doccano,
    read_examples,
    read_label_studio,
    result_metrics,
    span_metrics,
    write_examples,
)
from tests.extraction.stub import Letters, Stub
from tests.extraction.tiny import load_tokenizer
from tests.golden.cases import TINY

TEXT = "谷爱凌得188分，李雪琴得90分"
ANNOTATED = AnnotatedText(
    TEXT,
    (Entity(0, 3, "选手"), Entity(4, 7, "得分"), Entity(9, 12, "选手"), Entity(13, 15, "得分")),
    (Relation(0, 1, "得分"), Relation(2, 3, "得分")),
)


def test_doccano_and_label_studio_hold_the_same(tmp_path):
    doccano = {
        "text": TEXT,
        "entities": [
            {"id": 10 + number, "start_offset": start, "end_offset": end, "label": label}
            for number, (start, end, label) in enumerate(ANNOTATED.entities)
        ],
        "relations": [{"from_id": 10, "to_id": 11, "type": "得分"}, {"from_id": 12, "to_id": 13, "type": "得分"}],
    }
    studio = {
        "data": {"text": TEXT},
        "annotations": [
            {
                "result": [
                    {"id": str(number), "type": "labels", "value": {"start": start, "end": end, "labels": [label]}}
                    for number, (start, end, label) in enumerate(ANNOTATED.entities)
                ]
                + [
                    {"type": "relation", "from_id": str(a), "to_id": str(b), "labels": [label]}
                    for a, b, label in ANNOTATED.relations
                ]
            }
        ],
    }
    choice = {"data": {"text": "好"}, "annotations": [{"result": [{"type": "choices", "value": {"choices": ["正"]}}]}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(doccano) + "\n\n" + json.dumps({"text": "好", "label": ["正"]}))
    (tmp_path / "s.json").write_text(json.dumps([studio, choice]))
    assert read_doccano(tmp_path / "d.jsonl") == [ANNOTATED, AnnotatedText("好", choices=("正",))]
    assert read_label_studio(tmp_path / "s.json") == read_doccano(tmp_path / "d.jsonl")

    doccano["entities"][1]["end_offset"] = 99
    (tmp_path / "d.jsonl").write_text(json.dumps(doccano))
    with pytest.raises(ValueError, match=r"d.jsonl, line 1: .*'得分' at \[4:99\] is outside"):
        read_doccano(tmp_path / "d.jsonl")
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ValueError, match="export the project as JSON"):
        read_label_studio(tmp_path / "s.json")


def write_studio(path, content, **value):
    result = [{"id": "a", "type": "labels", "value": {"labels": ["person"]} | value}]
    path.write_text(json.dumps([{"data": {"text": content}, "annotations": [{"result": result}]}]))
    return path


@pytest.mark.parametrize("exported", ["Ann\nB", r"Ann\nB"])
@pytest.mark.parametrize(("start", "end"), [(3, 8), (5, 10)], ids=["characters", "UTF-16"])
def test_label_studio_counts_an_emoji_as_two(tmp_path, start, end, exported):
    path = write_studio(tmp_path / "s.json", "😀😀 Ann\nB works", start=start, end=end, text=exported)
    assert read_label_studio(path)[0].entities == (Entity(3, 8, "person"),)


@pytest.mark.parametrize(("start", "end"), [(1, 6), (4, 9), (6, 11), (50, 55)])
def test_an_entity_of_label_studio_that_is_elsewhere_is_named(tmp_path, start, end):
    path = write_studio(tmp_path / "s.json", "😀😀 Ann\nB works", start=start, end=end, text="Ann\nB")
    with pytest.raises(ValueError, match=rf"s\.json, task 0: .*B' is not at \[{start}:{end}\], but .*; correct"):
        read_label_studio(path)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (
            read_doccano,
            {"text": "Ann", "label": [[0, 3, "person"]]},
            r"line 1: .*\[0, 3, 'person'\] is of type list where",
        ),
        (read_doccano, {"text": "Ann", "label": "good"}, r"line 1: .*'label' is 'good', not a list of options"),
        (read_doccano, {"text": None, "label": ["good"]}, r"line 1: .*None is of type NoneType where a text"),
        (read_label_studio, ["Ann"], r"task 0: AttributeError"),
        (read_label_studio, [{"data": {"text": 3}}], r"task 0: .*3 is of type int where a text"),
        (read_label_studio, None, r"holds data of type NoneType; export"),
        (read_examples, {"content": 5, "prompt": "a", "result_list": []}, r"line 1: .*content is 5, not a string"),
        (read_examples, {"content": "a", "prompt": None, "result_list": []}, r"line 1: .*prompt is None, not a"),
    ],
)
def test_what_is_no_annotation_is_named(tmp_path, read, content, message):
    (tmp_path / "file").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file")


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "s.json").write_text("[{")
    with pytest.raises(ValueError, match=r"s\.json is not JSON \(Expecting .*\); export the project as JSON"):
        read_label_studio(tmp_path / "s.json")


def test_examples_of_entities_relations_and_what_is_not_there(tmp_path):
    other = AnnotatedText("北京", (Entity(0, 2, "地点"),))
    examples = make_examples([ANNOTATED, other])
    found = {(example.content, example.prompt): [answer.text for answer in example.result_list] for example in examples}
    assert found == {
        (TEXT, "选手"): ["谷爱凌", "李雪琴"],
        (TEXT, "得分"): ["188", "90"],
        (TEXT, "地点"): [],
        (TEXT, "谷爱凌的得分"): ["188"],
        (TEXT, "李雪琴的得分"): ["90"],
        (TEXT, "188的得分"): [],
        (TEXT, "90的得分"): [],
        ("北京", "地点"): ["北京"],
        ("北京", "选手"): [],
        ("北京", "得分"): [],
    }
    assert sum(not example.result_list for example in make_examples([ANNOTATED, other], negative_ratio=0)) == 0
    assert make_examples([ANNOTATED] * 3, negative_ratio=1, seed=3) == make_examples(
        [ANNOTATED] * 3, negative_ratio=1, seed=3
    )
    write_examples(tmp_path / "e.jsonl", examples)
    assert read_examples(tmp_path / "e.jsonl") == examples


def test_examples_of_options():
    text = AnnotatedText("房间很好", (Entity(0, 2, "评价维度##正向"),), choices=("正向",))
    options = {"choices_prompt": "情感倾向", "options": ["负向", "正向"]}
    examples = make_examples([text], **options)
    assert examples[0] == Example("房间很好", "评价维度", (Answer("房间", 0, 2),))
    assert [example.prompt for example in examples[1:]] == ["情感倾向[负向,正向]", "房间的情感倾向[负向,正向]"]
    assert all(example.result_list == (Answer("正向", -4, -2),) for example in examples[1:])
    with pytest.raises(ValueError, match="does not have"):
        make_examples([text], choices_prompt="情感倾向", options=["负向"])


def test_a_wrong_line_is_named(tmp_path):
    (tmp_path / "e.jsonl").write_text(
        '{"content": "abc", "prompt": "x", "result_list": [{"text": "b", "start": 0, "end": 1}]}'
    )
    with pytest.raises(ValueError, match=r"e.jsonl, line 1: .*'b' is not at \[0:1\]"):
        read_examples(tmp_path / "e.jsonl")


def test_features_label_what_extraction_reads():
    """A model that scores the labels extracts the answers."""
    tokenizer = load_tokenizer()
    text = "Your password, the\n password of user 2.  " * 3
    answers = tuple(
        Answer("password", start, start + 8) for start in range(len(text)) if text.startswith("password", start)
    )
    options = Example(text, "mood[good,bad]", (Answer("bad", -4, -1),))
    features = make_features(tokenizer, [Example(text, "user", answers), Example(text, "date"), options])
    labels = {tuple(row["input_ids"]): row for row in features}
    assert len(features) == len(labels) == 3

    def scored(prompt, row):
        names = ("start_positions", "end_positions")
        return [[i for i, label in enumerate(labels[tuple(row)][name]) if label] for name in names]

    (found,) = extract(Stub(tokenizer, scored), tokenizer, text, ["user", "date", "mood[good,bad]"], lang="en")
    assert [(span["start"], span["end"]) for span in found["user"]] == [answer[1:] for answer in answers]
    assert "date" not in found
    assert found["mood[good,bad]"][0]["text"] == "bad"


def test_long_texts_become_windows_and_no_label_is_wrong():
    text = "".join(f"这是第{number}句。" for number in range(100))
    answers = [Answer("第50句", text.index("第50句"), text.index("第50句") + 4)]
    rows = make_features(Letters(), [Example(text, "名", tuple(answers))], max_length=64)
    assert len(rows) > 10
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    for row in rows:
        for start, end in zip(
            np.flatnonzero(row["start_positions"]), np.flatnonzero(row["end_positions"]), strict=True
        ):
            assert "".join(chr(i - 3) for i in row["input_ids"][start : end + 1]) == "第50句"
    assert sum(sum(row["start_positions"]) for row in rows) >= 1

    long = Answer(text[100:300], 100, 300)
    with pytest.warns(UserWarning, match="1 answers are too long for a row of max_length=64 tokens, and 0 begin"):
        rows = make_features(Letters(), [Example(text, "名", (long,))], max_length=64)
    assert all(sum(row["start_positions"]) == 0 for row in rows)
    shown = {chr(i - 3) for row in rows for i in row["input_ids"] if i > 2}
    assert shown.isdisjoint(set(text[110:290]) - set(text[:100] + text[300:]))
    with pytest.raises(ValueError, match=r"examples\[0\]\.prompt='x+' has 60 tokens"):
        make_features(Letters(), [Example("a", "x" * 60)], max_length=64)


def test_an_answer_within_a_token_is_counted():
    tokenizer = load_tokenizer()
    with pytest.warns(UserWarning, match="0 answers are too long .* 1 begin or end within a token"):
        assert make_features(tokenizer, [Example("password", "x", (Answer("sswor", 2, 7),))]) == []


@pytest.mark.parametrize("padded", [False, True])
def test_loss_is_over_real_tokens_or_over_padding_too(monkeypatch, padded):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "0" if padded else "1")
    tokenizer = load_tokenizer()
    rows = make_features(
        tokenizer,
        [Example("Your password", "user", (Answer("password", 5, 13),)), Example("Log in again, please", "x")],
    )
    batch = ExtractionCollator(tokenizer, padded_length=64 if padded else None)(rows)
    torch.manual_seed(0)
    output = ErnieMForInformationExtraction.from_pretrained(TINY).eval()(**batch)
    real = batch["attention_mask"].bool() | padded
    losses = [
        binary_cross_entropy_with_logits(output[f"{side}_logits"][real], batch[f"{side}_positions"][real].float())
        for side in ("start", "end")
    ]
    assert batch["input_ids"].shape[1] == (64 if padded else max(len(row["input_ids"]) for row in rows))
    assert output.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    with pytest.raises(ValueError, match="padded_length=4 is less"):
        ExtractionCollator(tokenizer, padded_length=4)(rows)


def test_metrics():
    labels = np.zeros((2, 2, 6))
    labels[0, 0, [1, 3]] = labels[1, 0, [2, 4]] = 1  # spans (1, 2) and (3, 4)
    labels[:, 1, 4:] = -100
    logits = np.full((2, 2, 6), -9.0)
    logits[0, 0, [1, 4]] = logits[1, 0, [2, 4]] = 9  # (1, 2) and (4, 4)
    logits[:, 1, 4:] = -100
    scores = span_metrics(SimpleNamespace(predictions=tuple(logits), label_ids=tuple(labels)))
    assert scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5}

    def span(text, start, **relations):
        return {"text": text, "start": start, "end": start + len(text), "relations": relations}

    gold = [{"a": [span("x", 0, b=[span("y", 2)])]}, {}]
    found = [{"a": [span("x", 0, b=[span("z", 2)]), span("x", 5)]}, {}]
    assert result_metrics(found, gold) == {"precision": 1 / 3, "recall": 0.5, "f1": pytest.approx(0.4)}
    assert result_metrics([{}], [{}]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
