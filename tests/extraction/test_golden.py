"""What PaddleNLP's Taskflow extracts is what `compat=True` extracts."""

import pytest

from erniem_fast.extraction import Extractor
from tests.extraction.tiny import load_padded, load_tokenizer
from tests.golden.extraction_cases import CASES, read_goldens

# Scores have a standard deviation of 20 and sums in another order, so that probabilities differ by 1e-5 or so.
ATOL = 5e-4


@pytest.fixture(scope="module")
def goldens():
    return read_goldens()


@pytest.fixture(scope="module")
def extractor(goldens):
    model, tokenizer = load_padded(goldens["heads"]), load_tokenizer()
    return lambda case, compat: Extractor(
        model,
        tokenizer,
        case[1],
        lang=case[0],
        split_sentence=case[2],
        threshold=goldens["threshold"],
        compat=compat,
    )


def by_place(found):
    """The spans with the paths of names and spans that lead to them, sorted; and their probabilities."""
    spans = sorted(_flat(found, ()), key=lambda span: (repr(span[0]), -span[1]))
    return [place for place, _ in spans], [probability for _, probability in spans]


def _flat(found, path):
    for name, spans in found.items():
        for span in spans:
            place = (*path, name, span["text"], span.get("start"), span.get("end"))
            yield place, span["probability"]
            yield from _flat(span.get("relations", {}), place)


def assert_equal(ours, theirs):
    places, probabilities = by_place(theirs)
    assert by_place(ours)[0] == places
    assert by_place(ours)[1] == pytest.approx(probabilities, abs=ATOL)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case[1]} {case[2]}"[:30] for case in CASES])
def test_compat_extracts_what_paddlenlp_does(goldens, extractor, number):
    results = extractor(CASES[number], compat=True)(goldens["texts"])
    assert len(results) == len(goldens["texts"]) == 20
    for ours, theirs in zip(results, goldens["results"][number], strict=True):
        assert_equal(ours, theirs)


def test_goldens_are_worth_comparing(goldens):
    spans = [place for results in goldens["results"] for found in results for place, _ in _flat(found, ())]
    assert len(spans) > 100
    assert sum(place[-1] is None for place in spans) > 50  # options
    assert sum(place[-1] is not None and place[-2] >= 512 for place in spans) > 50  # behind the first piece
    assert {place[-3] for place in spans if place[-1] is None} >= {"正", "no"}
    assert max(len(place) for place in spans) == 12  # three levels


def test_without_compat_spans_of_texts_of_one_piece_are_the_same_where_no_fault_shows(goldens, extractor):
    numbers = [number for number, text in enumerate(goldens["texts"]) if len(text) < 400]
    results = extractor(CASES[1], compat=False)([goldens["texts"][number] for number in numbers])
    for ours, number in zip(results, numbers, strict=True):
        theirs = goldens["results"][1][number]
        assert_equal(
            ours,
            {
                name: kept
                for name, spans in theirs.items()
                if (kept := [s for s in spans if s.get("text") and "start" in s])
            },
        )
