"""The scripts run to their ends, on little data; what they reach on more, the README says."""

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
