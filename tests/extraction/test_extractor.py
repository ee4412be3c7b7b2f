# ruff: noqa: RUF001
import numpy as np
import pytest
import torch

from erniem_fast import ErnieMForInformationExtraction, ErnieMModel
from erniem_fast.extraction import Extractor, extract
from tests.extraction.stub import Letters, Stub
from tests.extraction.tiny import load_tokenizer
from tests.golden.cases import TINY

TEXT = "2月8日，谷爱凌以188.25分夺冠。李雪琴第二。"
ANSWERS = {
    "选手": ["谷爱凌", "李雪琴"],
    "谷爱凌的得分": ["188.25"],
    "时间": ["2月8日"],
    "情感[正,负]": ["正"],
    "谷爱凌的情感[正,负]": ["负"],
}


def run(texts, schema, answers=ANSWERS, **options):
    return extract(Stub(Letters(), answers), Letters(), texts, schema, **options)


def names(found):
    return {name: [span["text"] for span in spans] for name, spans in found.items()}


def test_results_have_the_form_of_paddlenlp():
    (found,) = run(TEXT, ["时间", {"选手": ["得分", "情感[正,负]"]}, "地点"])
    half = pytest.approx(torch.tensor(4.0).sigmoid().item() ** 2, abs=1e-6)
    assert found == {
        "时间": [{"text": "2月8日", "start": 0, "end": 4, "probability": half}],
        "选手": [
            {
                "text": "谷爱凌",
                "start": 5,
                "end": 8,
                "probability": half,
                "relations": {
                    "得分": [{"text": "188.25", "start": 9, "end": 15, "probability": half}],
                    "情感[正,负]": [{"text": "负", "probability": half}],
                },
            },
            {"text": "李雪琴", "start": 19, "end": 22, "probability": half},
        ],
    }


def test_texts_may_be_one_several_none_or_dictionaries():
    one = run(TEXT, "选手")
    assert run([TEXT, {"text": TEXT}, "", " \n"], "选手") == [*one, *one, {}, {}]
    assert run([], "选手") == []


def test_english_prompts():
    answers = {"person": ["Ann"], "age of Ann": ["30"], "mood of Ann [good,bad]": ["bad"]}
    (found,) = run("Ann is 30 .", {"person": ["age", "mood[good,bad]"]}, answers, lang="en")
    relations = found["person"][0]["relations"]
    assert names(relations) == {"age": ["30"], "mood[good,bad]": ["bad"]}


def test_a_prompt_about_a_text_is_scored_once():
    model = Stub(Letters(), ANSWERS)
    found = extract(model, Letters(), [TEXT, "x", TEXT], [{"选手": "得分"}, {"选手": "得分"}, "选手"])
    assert found[0] == found[2] != {}
    rows = [tuple(row) for call in model.calls for row in call]
    assert len(rows) == len(set(rows)) == 4  # two texts, then two subjects
    assert len(model.calls) == 2  # one for each level
    found[0]["选手"][0]["relations"]["得分"][0]["text"] = "changed"
    assert names(found[2]["选手"][0]["relations"]) == {"得分": ["188.25"]}


def test_batches_hold_the_tokens_that_are_asked_for():
    model = Stub(Letters(), ANSWERS)
    texts = [TEXT[:length] for length in range(1, 20)]
    found = extract(model, Letters(), texts, "选手", batch_tokens=60)
    assert all(sum(map(len, call)) <= 60 for call in model.calls)
    assert len(model.calls) > 5
    assert found == run(texts, "选手")


def test_numbers_may_be_those_of_numpy_and_torch():
    text = TEXT + "。" * 100
    expected = run(text, "选手", max_length=60, batch_tokens=120, threshold=0.5)
    for index, number in ((np.int64, np.float32), (np.uint8, np.float64), (torch.tensor, float)):
        found = run(text, "选手", max_length=index(60), batch_tokens=index(120), threshold=number(0.5))
        assert found == expected != [{}]


@pytest.mark.parametrize("lead", ["", "\n\n", "😀e\u0301 ", "\ud83d ", "Ａ　", "👩‍👩‍👧 ½ "])
def test_offsets_point_into_the_text_as_given(lead):
    tokenizer = load_tokenizer()
    answers = {"user": ["password"], "password of password": []}
    text = lead + "Your password, \n the password"
    (found,) = extract(Stub(tokenizer, answers), tokenizer, text, "user", lang="en")
    assert len(found["user"]) == 2
    assert all(text[span["start"] : span["end"]] == span["text"] == "password" for span in found["user"])


def test_spans_at_special_tokens_and_in_the_prompt_are_none():
    everywhere = Stub(Letters(), lambda prompt, row: (list(range(len(row))),) * 2)
    (found,) = extract(everywhere, Letters(), "ab", "x", lang="en")
    assert names(found) == {"x": ["a", "b"]}


def test_options_are_read_from_the_part_of_the_prompt_that_is_theirs():
    def part(prompt, row):  # a span that is a part of the second option
        return [len(prompt) - 3], [len(prompt) - 2]

    assert names(extract(Stub(Letters(), part), Letters(), "text", "mood[good,terrible]", lang="en")[0]) == {
        "mood[good,terrible]": ["terrible"]
    }
    assert extract(Stub(Letters(), lambda prompt, row: ([1], [2])), Letters(), "text", "mood[good,bad]") == [{}]


def test_overlap_finds_nested_spans():
    def nested(prompt, row):
        text = len(prompt) + 3
        return [text, text + 2], [text + 3, text + 5]

    model = Stub(Letters(), nested)
    assert names(extract(model, Letters(), "abcdef", "x")[0]) == {"x": ["cd"]}
    assert names(extract(model, Letters(), "abcdef", "x", overlap=True)[0]) == {"x": ["abcdef", "cd"]}


def test_long_texts_lose_nothing_at_the_cuts():
    sentence = "这里是第{}句，其中有谷爱凌，没有别人。"
    text = "\n".join(sentence.format(number) for number in range(400)) + "谷爱凌" * 300
    (found,) = run(text, "选手")
    assert len(found["选手"]) == 700
    assert all(text[span["start"] : span["end"]] == span["text"] == "谷爱凌" for span in found["选手"])
    starts = [span["start"] for span in found["选手"]]
    assert starts == sorted(set(starts))


def test_sentences_are_looked_at_alone_where_that_is_asked_for():
    model = Stub(Letters(), lambda prompt, row: ([len(prompt) + 3], [len(row) - 2]))  # all of a text
    text = "他说：“好。”\n\nIt is 3.5 m.  Yes!" + "长" * 600
    (found,) = extract(model, Letters(), text, "句", split_sentence=True)
    assert names(found)["句"][:3] == ["他说：“好。”", "It is 3.5 m.", "Yes!"]
    assert all(text[span["start"] : span["end"]] == span["text"] for span in found["句"])
    rows = [len(row) for row in model.calls[0]]
    assert sorted(rows) == sorted(5 + length for length in (7, 9, 4, 507, 156))
    assert extract(model, Letters(), ["", " \n "], "句", split_sentence=True) == [{}, {}]


@pytest.mark.parametrize("overlap", [False, True])
def test_spans_do_not_cross_sentences_that_are_looked_at_alone(overlap):
    def starts_then_ends(prompt, row):  # a start in the first sentence, a start and two ends in the second
        text = len(prompt) + 3
        return [text], [text + 1, text + 2] if row[text] == ord("b") + 3 else []

    model = Stub(Letters(), starts_then_ends)
    (found,) = extract(model, Letters(), "aaa. bcd.", "x", split_sentence=True, overlap=overlap)
    assert names(found) == {"x": ["bc", "bcd"] if overlap else ["bc"]}


def test_sentences_vote_on_options():
    def by_content(prompt, row):
        place = len(prompt) - (1 if ord("坏") + 3 in row else 3)
        return [place], [place]

    text = "好。坏。好。坏。坏。"
    found = extract(Stub(Letters(), by_content), Letters(), text, "情感[正,负]", split_sentence=True)
    assert names(found[0]) == {"情感[正,负]": ["负"]}


def test_options_of_long_texts_are_voted_on():
    def by_content(prompt, row):
        place = len(prompt) - (1 if ord("坏") + 3 in row else 3)
        return [place], [place]

    text = ("好" * 480 + "。") * 3 + "坏" * 100
    found = extract(Stub(Letters(), by_content), Letters(), text, "情感[正,负]")
    assert names(found[0]) == {"情感[正,负]": ["正"]}


def test_a_subject_that_is_too_long_for_a_prompt_is_told():
    text = "始" + "长" * 490 + "终"
    answers = {"段": [text]}
    with pytest.warns(UserWarning, match=r"schema\['段'\]\['名'\] was not looked for.*too long for max_length=512"):
        (found,) = run(text, {"段": "名"}, answers)
    assert [span["end"] for span in found["段"]] == [492]


def test_the_model_is_left_as_it_was():
    model = Stub(Letters(), ANSWERS)
    for mode in (True, False):
        model.train(mode)
        extract(model, Letters(), TEXT, "选手")
        assert model.training == mode


def test_parts_that_are_kept_out_of_training_stay_so():
    model = Stub(Letters(), ANSWERS)
    model.frozen, model.trained = torch.nn.Dropout().eval(), torch.nn.Dropout()
    extract(model, Letters(), TEXT, "选手")
    assert (model.training, model.frozen.training, model.trained.training) == (True, False, True)


def test_a_span_in_brackets_makes_no_classification():
    """Its prompt may be that of a classification about another span, and the answers are still two."""
    answers = {"s": ["x [good,bad]", "x"], "mood of x [good,bad]": ["good"]}
    schema = {"s": ["mood", "mood[good,bad]"]}
    (found,) = extract(Stub(Letters(), answers), Letters(), "x [good,bad]", schema, lang="en", overlap=True)
    related = {span["text"]: names(span["relations"]) for span in found["s"]}
    assert related == {"x": {"mood[good,bad]": ["good"]}, "x [good,bad]": {"mood": ["good"]}}
    places = {span["text"]: [one.get("start") for (one,) in span["relations"].values()] for span in found["s"]}
    assert places == {"x": [None], "x [good,bad]": [3]}


def test_a_model_without_a_head_and_a_tokenizer_that_is_not_loaded_are_refused():
    tokenizer = load_tokenizer()
    with pytest.raises(
        TypeError, match=r"model is of type ErnieMModel, which has no start_logits; load .*Extraction, or"
    ):
        extract(ErnieMModel.from_pretrained(TINY), tokenizer, "a", "x")
    with pytest.raises(TypeError, match=r"tokenizer='uie-m-base' is no tokenizer; load it"):
        extract(Stub(tokenizer, {}), "uie-m-base", "a", "x")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lang": "fr"}, ValueError, "lang='fr'"),
        ({"threshold": 1.5}, ValueError, r"threshold=1\.5"),
        ({"threshold": "high"}, ValueError, "threshold='high'"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens=0"),
        ({"max_length": 600}, ValueError, r"max_length=600 must be an integer in \[21, 512\]"),
        ({"max_length": 10}, ValueError, "max_length=10"),
        ({"max_length": np.float64(60)}, ValueError, "max_length=.*60.* must be an integer in"),
        ({"overlap": True, "compat": True}, ValueError, "overlap=True"),
        ({"schema": {"a": {"b" * 500: "c"}}}, ValueError, r"schema\['a'\]\['b.*'\] is too long .* room for 8 of"),
        ({"texts": 3}, TypeError, "texts is of type int"),
        ({"texts": ["a", 3]}, TypeError, r"texts\[1\] is 3"),
        ({"texts": [{"txt": "a"}]}, TypeError, r"texts\[0\]"),
    ],
)
def test_errors_name_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        run(**{"texts": TEXT, "schema": "选手"} | options)


def test_a_model_that_is_not_loaded_is_refused():
    with pytest.raises(TypeError, match="model='uie-m-base' is no model; load it"):
        Extractor("uie-m-base", Letters(), "a")


def test_results_depend_on_nothing_else_in_the_call():
    torch.manual_seed(0)
    model, tokenizer = ErnieMForInformationExtraction.from_pretrained(TINY), load_tokenizer()
    texts = ["Your password was changed.", "Log in again", "已存在一位使用该名字的用户。", "a " * 300]
    schema = ["user", {"password": "date"}, "mood[good,bad]"]
    together = extract(model, tokenizer, texts, schema, lang="en", threshold=0.45)
    alone = [extract(model, tokenizer, text, schema, lang="en", threshold=0.45, batch_tokens=600)[0] for text in texts]
    assert [names(found) for found in together] == [names(found) for found in alone]
    assert sum(map(len, together)) > 3
