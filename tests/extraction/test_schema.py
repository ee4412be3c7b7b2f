# ruff: noqa: RUF001
import pytest

from erniem_fast.extraction.schema import parse


def prompts(schema, subject="X", lang="zh"):
    """The prompt of each node, those below the top about `subject`."""
    lines = []

    def walk(nodes, about):
        for node in nodes:
            lines.append(node.prompt(about, lang))
            walk(node.children, subject)

    walk(parse(schema), None)
    return lines


@pytest.mark.parametrize(
    ("schema", "lang", "expected"),
    [
        ("时间", "zh", ["时间"]),
        (["时间", "选手"], "zh", ["时间", "选手"]),
        ({"竞赛名称": ["主办方", "承办方"]}, "zh", ["竞赛名称", "X的主办方", "X的承办方"]),
        ({"a": {"b": {"c": "d"}}}, "en", ["a", "b of X", "c of X", "d of X"]),
        ([{"a": "b"}, {"a": ["c", "b"]}], "en", ["a", "b of X", "c of X"]),
        ({"评价维度": ["观点词", "情感倾向[正向，负向]"]}, "zh", ["评价维度", "X的观点词", "X的情感倾向[正向,负向]"]),
        ({"Aspect": "Sentiment [good, bad]"}, "en", ["Aspect", "Sentiment of X [good, bad]"]),
        ({"Aspect": "Sentiment［good，bad］"}, "en", ["Aspect", "Sentiment of X [good,bad]"]),
        ({"Ａ": None, "b": []}, "en", ["A", "b"]),
    ],
)
def test_prompts(schema, lang, expected):
    assert prompts(schema, lang=lang) == expected


def test_options():
    assert parse("s[a,b]")[0].options() == ["a", "b"]
    assert parse("情感［正，负］")[0].options() == ["正", "负"]
    assert parse("s[a,b] more")[0].options() == []
    assert parse("s[1] of[a,b]")[0].options() == ["a", "b"]


@pytest.mark.parametrize(
    ("schema", "error", "words"),
    [
        ({"a": {"b": [3]}}, TypeError, r"schema\['a'\]\['b'\] holds 3"),
        ({"a": {"b": 3}}, TypeError, r"schema\['a'\]\['b'\] holds 3"),
        (None, TypeError, "holds None"),
        ([], ValueError, "names nothing"),
        ("", ValueError, "blank"),
        ([{"a": "　"}], ValueError, r"schema\['a'\] holds the blank name"),
        ("s[]", ValueError, "options"),
        ("s[a,,b]", ValueError, "options"),
        ("s[a,a]", ValueError, "options"),
        ("[a,b]", ValueError, "options"),
    ],
)
def test_a_malformed_schema_is_refused_by_its_place(schema, error, words):
    with pytest.raises(error, match=words):
        parse(schema)


def test_a_schema_that_contains_itself_is_refused():
    schema = {"a": []}
    schema["a"].append(schema)
    with pytest.raises(ValueError, match="contains itself"):
        parse(schema)
