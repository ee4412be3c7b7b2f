"""`make gpu` as far as it goes without one: its environment, its steps, and what it says when something is missing."""

import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from bench import ROOT, __main__
from bench.gpu import environment, steps, verify_in_parallel
from bench.gpu.steps import Step
from erniem_fast.verification.battery import Outcome


def python(name, code, **options):
    return Step(name, ["-c", code], **options)


def test_the_environment_needs_no_network_and_holds_this_package(tmp_path):
    folder = tmp_path / "venv"
    no_network = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "bench.gpu.environment", str(folder)]
    subprocess.run(command, env=no_network, cwd=ROOT, check=True, timeout=120)
    code = "import erniem_fast, sys, torch; print(sys.prefix, erniem_fast.__file__, torch.__version__, sep='\\n')"
    out = subprocess.check_output([folder / "bin/python", "-c", code], env=no_network, cwd=tmp_path, text=True)
    assert out.splitlines() == [str(folder), str(ROOT / "erniem_fast/__init__.py"), torch.__version__]


def test_the_environment_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "NEEDED", ("torch", "package_of_the_future"))
    assert environment.main(tmp_path / "venv") == 1
    assert "-m pip install package_of_the_future`" in capsys.readouterr().err


def test_steps_go_on_after_one_that_fails_and_are_reported(tmp_path, capfd):
    commands = [
        python("first", "print('why'); raise SystemExit(3)"),
        python("second", "print('second ran')", needs=("json", "package_of_the_future")),
        python("third", "import time; print('begun', flush=True); time.sleep(60)", limit=8),
        python("fourth", "print('fourth ran')", needs=("json",)),
    ]
    assert not steps.run_part("some", commands, tmp_path)
    out = capfd.readouterr().out
    assert "fourth ran\n" in out
    assert "second ran" not in out
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "gpu-some.md").read_text().splitlines()[6:]]
    assert [(name, verdict, rest[1:]) for name, verdict, *rest in rows] == [
        ("first", "failed with exit code 3", ["why"]),
        ("second", "left out, for want of package_of_the_future (`pip install package_of_the_future`)", []),
        ("third", "ended after 8 s", ["KeyboardInterrupt"]),
        ("fourth", "passed", ["fourth ran"]),
    ]
    assert steps.run_part("some", commands[3:], tmp_path)


def test_a_part_ends_in_time_and_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BUDGET", 8)
    slow = "import time; time.sleep(60)"
    assert not steps.run_part("some", [python("first", ""), python("slow", slow), python("last", "")], tmp_path)
    verdicts = [line.split(" | ")[1] for line in (tmp_path / "gpu-some.md").read_text().splitlines()[6:]]
    assert verdicts[0] == "passed"
    assert verdicts[1].startswith("ended after")
    assert verdicts[2] == "left out, for want of time"


def test_what_is_ended_may_write_down_what_it_has(tmp_path):
    code = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path(sys.argv[2]).write_text("figures")
"""
    begun, kept = tmp_path / "begun", tmp_path / "kept"
    process = steps.start(["-c", code, begun, kept])
    while not begun.exists():
        time.sleep(0.01)
    steps.interrupt(process)
    assert kept.read_text() == "figures"
    assert process.wait(10) == 0


def test_every_step_is_there():
    for step in itertools.chain(*steps.parts(pathlib.Path("results")).values()):
        option, module, *arguments = step.command
        assert (option, importlib.util.find_spec(module) is None) == ("-m", False)
        if module == "bench":
            assert arguments[0] in __main__.COMMANDS
            assert arguments[-2:] == ["--output", "results"]


def test_a_part_that_is_not_there_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        steps.main(["colours"])
    assert "there is no part 'colours'; choose from correctness, kernels, model, sweep" in capsys.readouterr().err


def test_every_check_is_in_one_share_and_failures_are_told(monkeypatch, capsys):
    monkeypatch.setattr(verify_in_parallel, "battery", lambda device: range(7))
    monkeypatch.setattr(verify_in_parallel, "outcome", lambda check: Outcome(f"check {check}", 2 * (check % 3 == 0)))
    shares = [verify_in_parallel.run_share("cpu", index, 3) for index in range(3)]
    assert shares == [(3, 3), (2, 0), (2, 0)]
    assert capsys.readouterr().out.split("\n") == ["check 0", "check 3", "check 6", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="torch finds no CUDA device, so there is nothing to run"):
        steps.main([])
