"""The benchmark of a newcomer's first hour: what it takes from the README, and a way with short commands."""

import subprocess
import sys

import pytest

from bench import ROOT, newcomer
from bench.record import read

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_are_the_readme_s():
    assert newcomer.install_lines(README)[-1] == "python -m erniem_fast build"
    assert newcomer.install_lines(README)[0].startswith("pip install ")
    *_, last = newcomer.first_embedding(README)
    assert "embed" in last
    assert all(block in README for block in newcomer.first_embedding(README))


def test_the_quick_start_ends_with_the_first_embedding():
    readme = (
        "\n## Quick start\n```python\na = 1\n```\n```python\nvectors = erniem_fast.embed(a)\n```\n```python\nb\n```\n"
    )
    assert newcomer.first_embedding(readme) == ["a = 1\n", "vectors = erniem_fast.embed(a)\n"]


def test_what_pip_downloads_is_summed():
    printed = """Collecting torch
  Downloading torch-2.13.0-cp311.whl.metadata (29 kB)
Downloading torch-2.13.0-cp311.whl (180.5 MB)
Downloading tiny-1-py3-none-any.whl (512 bytes)
  Using cached numpy-2.4.0.whl (17.9 MB)
"""
    assert newcomer.downloaded(printed) == 180_500_000 + 29_000 + 512
    assert newcomer.downloaded("Requirement already satisfied: torch") is None


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a repository can be cloned")
def test_a_way(tmp_path, monkeypatch, capsys):
    """Each command runs in a fresh home and virtual environment. Short commands stand in for the README's."""
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    commands = [
        newcomer.CLONE,
        f"{sys.executable} -m venv --without-pip ../venv",
        'echo \'Downloading a.whl (1.5 MB)\'; test -z "$PYTHONPATH"; test -z "$(ls -A ~)"; test -f README.md',
        "python -c 'import sys; assert sys.prefix.endswith(\"/venv\"), sys.prefix'",
    ]
    monkeypatch.setattr(newcomer, "embedding_commands", lambda *_: commands)
    assert newcomer.main(["--output", str(tmp_path)]) == 0
    run = read(newcomer.NewcomerRun, tmp_path / "newcomer.json")
    (way,) = run.ways
    assert way.steps[0].command == "git clone --quiet erniem_fast ."
    assert [step.downloaded for step in way.steps] == [None, None, 1_500_000, None]
    assert way.disk > 2**20
    report = (tmp_path / "newcomer.md").read_text(encoding="utf-8")
    assert "**From `git clone` to the first embedding**" in report
    assert run.python == sys.version.split()[0]
    assert run.commit == subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


def test_a_command_that_fails_is_told(monkeypatch, capsys):
    monkeypatch.setattr(newcomer, "embedding_commands", lambda *_: ["echo no such package; false"])
    assert newcomer.main([]) == 1
    assert "`echo no such package; false` failed:\nno such package" in capsys.readouterr().err
