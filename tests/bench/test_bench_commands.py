"""`python -m bench`: its list of commands, and what each of them loads."""

import subprocess
import sys

import pytest

from bench import ROOT
from bench.__main__ import COMMANDS, main


def test_without_a_command_all_are_listed():
    done = subprocess.run([sys.executable, "-m", "bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.partition("commands:\n")[2].splitlines()]
    assert lines == [[name, summary] for name, (_, summary) in COMMANDS.items()]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "codegen"])
def test_every_command_has_options_of_its_own(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m bench {command} ")


def test_codegen_has_options_of_its_own():
    """In a process of its own, since it sets how Triton compiles."""
    out = subprocess.check_output([sys.executable, "-m", "bench", "codegen", "--help"], cwd=ROOT, text=True)
    assert out.startswith("usage: python -m bench codegen ")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["fast"])
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_listing_commands_and_making_an_environment_load_no_package():
    """`make gpu` makes its environment with a Python that may have nothing installed."""
    code = (
        "import sys, bench.__main__, bench.gpu.environment; print(*{'torch', 'numpy', 'erniem_fast'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "\n"
