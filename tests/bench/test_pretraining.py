"""The comparison of pre-training objectives: what is held out, what a recipe is trained on, and going on."""

import json

import pytest

from bench.model import pretraining
from bench.model.figures import PretrainingRun
from bench.model.text import read_translations
from bench.record import read
from erniem_fast.pretraining import OBJECTIVES

OPTIONS = [
    "--tokens",
    "1500",
    "--token-budget",
    "256",
    "--layers",
    "1",
    "--hidden",
    "32",
    "--seeds",
    "1",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def rows():
    """Of four languages, so few that a run takes a second."""
    rows = [row for row in read_translations() if row.language in ("de", "fr", "zh", "sw")]
    return [row for row in rows if len(row.english) < 25][::3]


def test_held_out_sentences_are_not_trained_on(rows):
    """Neither they nor their translations into other languages; about a tenth is held out."""
    trained, held_out = pretraining.split(rows)
    assert len(trained) + len(held_out) == len(rows)
    assert not {row.english for row in trained} & {row.english for row in held_out}
    assert 0.04 < len(held_out) / len(rows) < 0.2


def test_recipes(rows, tmp_path, monkeypatch):
    """Each has its tokens, of its objectives; the last one BTMLM only in its last third."""
    monkeypatch.setattr(pretraining, "WORDS", 700)
    arguments = pretraining.parse_arguments([*OPTIONS, "--tokens", "9000"])
    tokenizer = pretraining.train_tokenizer(rows, tmp_path)
    languages = ["en", "de", "fr", "zh", "sw"]
    expected = [{"mmlm"}, {"mmlm", "tlm"}, {"mmlm", "tlm", "camlm"}, {*OBJECTIVES}]
    for name, objectives in zip(pretraining.RECIPES, expected, strict=True):
        seen, drawn = 0, []
        for batch in pretraining.batches(name, 0, arguments, tokenizer, languages, rows):
            drawn.append((seen, {OBJECTIVES[each] for each in batch["objective_ids"].tolist()}))
            seen += batch["input_ids"].shape[1]
        assert 9000 <= seen < 9000 + 2 * 256
        assert set().union(*(names for _, names in drawn)) == objectives
        assert all("btmlm" not in names for start, names in drawn if start < 6000)


def test_an_interrupted_run_goes_on(rows, tmp_path, monkeypatch):
    """What is whole is not trained again."""
    monkeypatch.setattr(pretraining, "WORDS", 700)
    monkeypatch.setattr(pretraining, "read_translations", lambda: rows)
    keep, kept = pretraining.keep, []

    def interrupted(run, *arguments):
        keep(run, *arguments)
        kept.append(len(run.runs))
        if kept == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "keep", interrupted)
    assert pretraining.main([*OPTIONS, "--output", str(tmp_path)]) == 130
    assert pretraining.main([*OPTIONS, "--output", str(tmp_path)]) == 0
    assert kept == [1, 2, 3, 4]
    names = list(pretraining.RECIPES)
    (path,) = tmp_path.glob("*.json")
    run = read(PretrainingRun, path)
    assert [each.recipe for each in run.runs] == names
    for each in run.runs:
        assert each.languages.keys() == {"de", "fr", "zh", "sw"}
        assert each.curve[0].tokens == 0
        assert each.curve[-1].tokens >= 1500
        assert each.curve[-1].accuracy == pytest.approx(sum(each.languages.values()) / 4)
    report = path.with_suffix(".md").read_text()
    assert all(f"| {name} " in report for name in names)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(path.read_text())["settings"]["threads"] >= 1
