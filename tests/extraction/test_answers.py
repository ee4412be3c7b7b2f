import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from erniem_fast import ErnieMForQuestionAnswering, extract_answer
from erniem_fast.extraction import answer_metrics
from erniem_fast.extraction.answers import answer_features, best_spans, collate_answers
from tests.extraction.stub import Letters, Stub
from tests.extraction.tiny import load_tokenizer
from tests.golden.cases import TINY

CONTEXT = "这里没有什么。" * 80 + "谷爱凌得了188分。" + "这里也没有。" * 80


def answer(answers, context=CONTEXT, **options):
    question = options.pop("question", "谁")
    return extract_answer(Stub(Letters(), answers), Letters(), question, context, **options)


def test_an_answer_is_found_anywhere_in_a_long_context():
    (found,) = answer({"谁": ["谷爱凌"]})
    assert found["text"] == CONTEXT[found["start"] : found["end"]] == "谷爱凌"
    assert found["score"] == 8.0


def test_best_spans_are_those_of_all_pairs():
    draw = np.random.RandomState(0)
    for _ in range(50):
        length, longest, count = draw.randint(1, 12), draw.randint(1, 14), draw.randint(1, 6)
        starts, ends = draw.normal(size=(2, length))
        pairs = [(i, j) for i in range(length) for j in range(i, min(i + longest, length))]
        expected = sorted(pairs, key=lambda pair: -(starts[pair[0]] + ends[pair[1]]))[:count]
        assert [span[:2] for span in best_spans(starts, ends, count, longest)] == expected


def test_probabilities_compare_the_candidates_and_no_answer():
    best = answer({"谁": ["谷爱凌"]}, n_best=3)
    assert best[0]["text"] == "谷爱凌"
    assert sorted((each["score"] for each in best), reverse=True) == [each["score"] for each in best]
    assert sum(each["probability"] for each in best) <= 1 + 1e-9
    (none,) = answer({}, no_answer=True)
    assert none.keys() == {"text", "score", "probability"}
    assert none["text"] == ""
    assert answer({}, context="", no_answer=False)[0]["text"] == ""
    assert answer({"谁": ["谷爱凌"]}, no_answer=True)[0]["text"] == "谷爱凌"


def test_lists_give_lists():
    model = Stub(Letters(), {"谁": ["a"], "几": ["3"]})
    found = extract_answer(model, Letters(), ["谁", "几"], ["a3", "b 3"])
    assert [each[0]["text"] for each in found] == ["a", "3"]


@pytest.mark.parametrize("index", [np.int64, np.int8, torch.tensor])
def test_numbers_may_be_those_of_numpy_and_torch(index):
    numbers = {"n_best": 3, "max_answer_tokens": 5, "max_length": 60, "batch_tokens": 120}
    found = answer({"谁": ["谷爱凌"]}, **{name: index(number) for name, number in numbers.items()})
    assert found == answer({"谁": ["谷爱凌"]}, **numbers)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n_best": 0}, ValueError, "n_best=0"),
        ({"max_length": 1000}, ValueError, "max_length=1000"),
        ({"context": 3}, TypeError, "question="),
        ({"question": ["a"], "context": 3}, TypeError, "context=3"),
        ({"context": ["a", "b"]}, TypeError, "question="),
    ],
)
def test_errors_name_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        answer({}, **options)


def test_features_teach_what_is_extracted():
    tokenizer = load_tokenizer()
    context = "Log in again. Your password was changed. " * 20
    place = context.rindex("password"), context.rindex("password") + 8
    rows = answer_features(tokenizer, ["What?", "Who?"], [context, context], [place, None], max_length=64)
    shown = [row for row in rows if row["start_positions"]]
    assert 1 <= len(shown) < len(rows) / 2
    for row in shown:
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
        assert "".join(tokens).strip("▁") == "password"
    batch = collate_answers(rows, tokenizer.pad_token_id)
    torch.manual_seed(0)
    output = ErnieMForQuestionAnswering.from_pretrained(TINY).eval()(**batch)
    losses = [cross_entropy(output[f"{side}_logits"], batch[f"{side}_positions"]) for side in ("start", "end")]
    assert output.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    with pytest.raises(ValueError, match="is not within"):
        answer_features(tokenizer, ["a"], ["b"], [(5, 9)])


def test_a_question_that_leaves_no_room_for_a_context_is_refused():
    """In training as in extraction; windows of no tokens would have no end."""
    question = "谁" * 50
    with pytest.raises(ValueError, match=r"question\[0\]='谁.* has 50 tokens, .* of max_length=60 for the context"):
        answer({}, question=question, max_length=60)
    with pytest.raises(ValueError, match=r"question\[1\]='谁.* has 50 tokens, .* of max_length=60 for the context"):
        answer_features(Letters(), ["谁", question], ["谷爱凌"] * 2, [None] * 2, max_length=60)


@pytest.mark.parametrize(
    ("lang", "prediction", "answers", "exact", "f1"),
    [
        ("en", "The  Eiffel-Tower!", ["eiffeltower"], 100, 100),
        ("en", "big red dog", ["a red dog", "cat"], 0, 80),
        ("en", "", [], 100, 100),
        ("en", "", ["x"], 0, 0),
        ("zh", "《谷爱凌》", ["谷爱凌"], 100, 100),
        ("zh", "谷爱玲", ["谷爱凌"], 0, 200 / 3),
        ("de", "der Hund", ["Hund"], 100, 100),
    ],
)
def test_metrics(lang, prediction, answers, exact, f1):
    scores = answer_metrics([prediction], [answers], lang)
    assert scores == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_metrics_are_means():
    assert answer_metrics(["a b", "x"], [["b"], ["y"]])["f1"] == pytest.approx(50)  # "a" is an article
    with pytest.raises(ValueError, match="lang='fr'"):
        answer_metrics(["a"], [["a"]], "fr")
