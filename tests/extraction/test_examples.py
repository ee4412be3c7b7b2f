"""The scripts run to their ends, on little data; what they reach on more, the README says."""

import json
import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "words"), [("finetune_extraction.py", "results by schema: precision"), ("finetune_qa.py", "exact_match")]
)
def test_a_script_trains_tests_and_saves(script, words, tmp_path, monkeypatch, capsys):
    options = ["--texts", "4", "--epochs", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert words in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("start", [6, 4, -1, 50])
def test_an_answer_of_squad_that_is_elsewhere_is_named(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    read_squad = runpy.run_path(str(EXAMPLES / "finetune_qa.py"))["read_squad"]
    question = {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 3}]}
    paragraph = {"context": "😀: Ann works", "qas": [question, {"question": "Why?", "answers": []}]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
    assert read_squad(str(file)) == [("Who?", "😀: Ann works", [(3, 6)]), ("Why?", "😀: Ann works", [])]
    question["answers"][0]["answer_start"] = start
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"squad\.json: the answer 'Ann' is not at answer_start={start} of '😀: .*'"):
        read_squad(str(file))
