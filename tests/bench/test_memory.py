"""The benchmark of memory, on the tiny checkpoint."""

import pytest
from runs import TINY

from bench.model import memory
from bench.model.figures import MemoryRun
from bench.record import read


def test_a_run(tmp_path, monkeypatch):
    """Both classes' steps are measured; the exit code says whether the bound holds."""
    options = ["--model", str(TINY), "--tokens", "512", "--threads", "1", "--output", str(tmp_path)]
    codes = [memory.main(options)]
    monkeypatch.setattr(memory, "BOUND", 0.5)
    codes.append(memory.main(options))
    assert codes == [0, 1]
    run = read(MemoryRun, tmp_path / "memory-tiny-float32.json")
    assert [each.name for each in run.results] == list(memory.CLASSES)
    assert all(each.peak_memory > each.loaded_memory > 2**25 for each in run.results)
    assert "| ErnieMForMaskedLM |" in (tmp_path / "memory-tiny-float32.md").read_text()


def test_tokens_are_whole_rows(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--tokens", "100"])
    assert "--tokens 100 is no multiple of 512" in capsys.readouterr().err
