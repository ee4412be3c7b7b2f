"""The commands, as a user types them."""

import pytest

from erniem_fast.__main__ import main
from erniem_fast.native import compiler, library
from tests.commands import run


def test_build_makes_the_library_that_status_then_names(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert "cpu: not built: run `python -m erniem_fast build`" in run("status", **environment).stdout
    built = run("build", **environment)
    assert built.returncode == 0, built.stderr
    compiling, *lines = built.stdout.splitlines()
    assert compiling == "compiling for cpu: one core takes about 17 s"
    progress, rest = lines[:9], lines[9:]
    assert [line.split()[0] for line in progress] == [f"[{number}/9]" for number in range(1, 10)]
    assert {line.split()[1] for line in progress} > {"attention_cpu.cpp", "packed_cpu.cpp"}
    assert rest[0].startswith(f"cpu: {tmp_path}")
    assert "timing products: forward" in rest
    status = run("status", **environment).stdout
    assert "embeddings   runs by native" in status
    assert status.splitlines()[-1] == f"cpu: everything runs natively, by {rest[0].removeprefix('cpu: ')}."


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"CXX": "missing++"}, "CXX='missing++' names a program that does not exist; correct it or unset it."),
        ({"CXX": "false"}, "the compiler failed:"),
    ],
)
def test_build_says_what_failed(tmp_path, environment, error):
    failed = run("build", XDG_CACHE_HOME=str(tmp_path), **environment)
    assert failed.returncode == 1
    assert failed.stderr.startswith(error)
    assert "Traceback" not in failed.stderr
    assert failed.stdout == "" or error == "the compiler failed:"


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("ERNIEM_FAST_KERNELS", "on", "ERNIEM_FAST_KERNELS='on' is not a valid choice; use one of auto, off."),
        ("ERNIEM_FAST_KERNEL", "off", "ERNIEM_FAST_KERNEL is not a flag of erniem_fast; unset it."),
    ],
)
def test_a_wrong_flag_is_named_without_a_traceback(flag, value, error, monkeypatch, capsys):
    monkeypatch.setenv(flag, value)
    monkeypatch.setattr("sys.argv", ["erniem_fast", "status"])
    assert main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(error)


def test_build_says_first_that_there_is_no_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)  # ziglang
    monkeypatch.setattr("sys.argv", ["erniem_fast", "build"])
    library.path.cache_clear()
    assert main() == 1
    library.path.cache_clear()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("No C++ compiler was found: looked for $CXX, c++, g++, clang++, and the package ziglang.")
