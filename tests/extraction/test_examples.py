"""The scripts run to their ends, on little data; what they reach on more, the README says."""

import json
import pathlib
import runpy
import sys

import pytest

from tests.examples.scripts import import_example

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


NO_ANSWERS = {"data": [{"paragraphs": [{"context": "Ann works", "qas": [{"question": "Who?"}]}]}]}


@pytest.mark.parametrize(
    ("script", "content", "more", "message"),
    [
        ("finetune_extraction", "", [], r"train\.json has no examples$"),
        ("finetune_extraction", None, ["--max-length=513"], "--max-length 513 is more than the 512 positions"),
        ("finetune_extraction", None, ["--batch-size=0"], "--batch-size 0 is no multiple of 1 devices"),
        ("finetune_qa", "", [], r"train\.json is not SQuAD's JSON with answers"),
        ("finetune_qa", "[]", [], r"train\.json is not SQuAD's JSON with answers"),
        ("finetune_qa", '{"data": []}', [], r"train\.json has no questions$"),
        ("finetune_qa", json.dumps(NO_ANSWERS), [], r"train\.json is not .* \(KeyError\('answers'\)\)"),
        ("finetune_qa", None, ["--max-length=513"], "--max-length 513 is more than the 512 positions"),
        ("finetune_qa", None, ["--batch-size=0"], "--batch-size 0 is no multiple of 1 devices"),
    ],
)
def test_what_a_script_refuses(script, content, more, message, tmp_path, monkeypatch):
    file = tmp_path / "train.json"
    if content is not None:
        file.write_text(content)
        more = ["--train", str(file), *more]
    monkeypatch.setattr(sys, "argv", [script, "--texts=4", *more])
    with pytest.raises(SystemExit, match=message):
        import_example(script).main()


def test_a_batch_is_that_of_all_gpus(tmp_path, monkeypatch):
    """Also if one process sees several."""
    example = import_example("shared")
    monkeypatch.setattr(example.TrainingArguments, "n_gpu", 4)
    arguments = import_example("finetune_extraction").parse(["--batch-size=8"])
    found = example.text_training_arguments(arguments, str(tmp_path))
    assert (found.per_device_train_batch_size, found.train_batch_size) == (2, 8)
