"""The verdict of `python -m erniem_fast status`, in every state that a machine can be in."""

import re
import shutil
import stat

import pytest
import torch

from bench import RESULTS
from erniem_fast import flags, status
from erniem_fast.native import compiler, library
from erniem_fast.ops import triton

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    for name in flags.FLAGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.path.cache_clear()
    yield tmp_path / "cache" / "erniem_fast"
    library.path.cache_clear()


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """The folder of all programs on the PATH, with a C++ compiler and ninja."""
    for name in ("c++", "ninja"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def verdict(device=CPU):
    return "\n".join(status._verdict(device))


@pytest.fixture
def built():
    """The path of a library that is built."""
    if not library.is_built("cpu"):
        pytest.skip("no compiler")
    return library.path("cpu")


def test_everything_native(built):
    assert verdict() == f"cpu: everything runs natively, by {built}."
    assert status.status().endswith(verdict())


def test_a_library_of_the_wheel(built, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    shipped = shutil.copy(built, tmp_path)
    assert verdict() == f"cpu: everything runs natively, by {shipped}."


def test_not_built(cache, compilers):
    build = r"run `python -m erniem_fast build` (about 17 s; one text then runs twice as fast)."
    assert verdict() == f"cpu: not built: {build}"
    cache.mkdir(parents=True)
    (cache / "native_cpu-0123456789abcdef.so").touch()
    assert verdict() == f"cpu: not built for this version and CPU, only for others: {build}"


def test_no_compiler(cache, compilers, monkeypatch):
    (compilers / "c++").unlink()
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert verdict().startswith("cpu: not built, and cannot be: No C++ compiler was found: looked for $CXX, c++, g++")
    monkeypatch.setenv("CXX", "missing++")
    assert verdict().startswith("cpu: not built, and cannot be: CXX='missing++' names a program that does not exist")


def test_a_cache_that_cannot_be_written_to(cache, compilers):
    cache.parent.write_text("")
    assert verdict() == f"cpu: not built, and cannot be: {cache} cannot be written to. {library.OTHER_CACHE}"


def test_a_library_that_is_not_trusted(built, cache):
    cache.mkdir(parents=True, mode=0o700)
    shutil.copy(built, cache)
    cache.chmod(0o777)
    assert library.path("cpu") == cache / built.name
    library._opened.pop(library.path("cpu"), None)
    assert verdict().startswith(f"cpu: nothing runs natively: {cache} can be written to by others (mode 777)")


def test_flags(built, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_ATTENTION", "torch")
    assert verdict() == "cpu: ERNIEM_FAST_ATTENTION=torch slows models down; unset to run fast."
    monkeypatch.setenv("ERNIEM_FAST_PACKING", "0")
    assert "ERNIEM_FAST_PACKING=0, ERNIEM_FAST_ATTENTION=torch slow models" in verdict()
    monkeypatch.setenv("ERNIEM_FAST_ATTENTION", "auto")
    monkeypatch.setenv("ERNIEM_FAST_RECOMPUTE", "1")
    assert verdict().startswith("cpu: ERNIEM_FAST_PACKING=0 slows")


def test_a_flag_that_cannot_be_served(built, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_ATTENTION", "triton")
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert verdict().startswith("cpu: a model cannot run: ERNIEM_FAST_ATTENTION=triton cannot be served: Triton is not")


def test_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "absence", lambda device: None)
    monkeypatch.setattr(library, "path", lambda device: library.SHIPPED / "none.so")
    found = verdict(torch.device("cuda", 0))
    assert found.startswith("cuda:0: PyTorch runs embeddings, attention, bias_gelu, add_norm: ")
    assert "Triton is not installed; `pip install triton`" in found


def test_the_gpus_that_are_named_have_results():
    assert {each.name.split("-")[1] for each in RESULTS.glob("nvidia-*")} == {"h100", "h200"}
    assert all(name in status.status() for name in ("H100", "H200", "`python -m erniem_fast verify`"))


def test_what_is_said_of_a_gpu_is_in_its_record():
    record = (RESULTS / "nvidia-h200" / "gpu-correctness.md").read_text(encoding="utf-8")
    checks, failures = re.search(r"(\d+) checks, (\d+) failures", record).groups()
    date = re.search(r"\d{4}-\d{2}-\d{2}", record).group()
    assert failures == "0"
    assert f"({date}), where all {checks} checks passed" in status.status()
