"""CONTRIBUTING's worked example of an op: in a copy of the repository, all that its page promises is true.

The copy has the example's op beside the others. A process of its own runs there the tests that the page names.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from erniem_fast.native import library
from tests import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("\n## Add an op")[2].partition("\n## ")[0]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# The path of a new file stands in the text before its block.
FILES = {
    re.findall(r"`([\w./]+/[\w.]+)`", SECTION[: block.start()])[-1]: block[2]
    for block in BLOCK.finditer(SECTION)
    if block[1] in ("python", "cpp")
}
(DIFF,) = (block for language, block in BLOCK.findall(SECTION) if language == "diff")
HUNKS = re.findall(r"^@@ (\S+)\n(.*?)(?=^@@|\Z)", DIFF, flags=re.DOTALL | re.MULTILINE)
(PYTEST,) = re.findall(r"^pytest (.*)$", SECTION, flags=re.MULTILINE)


def patched(text, hunk):
    """The text with the lines of a hunk: those that begin with a minus or a blank must stand in it, once."""
    lines = hunk.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("erniem_fast", "kernels", "csrc", "tests", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "data")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, folder)
    for path, block in FILES.items():
        assert not (folder / path).exists(), path
        (folder / path).write_text(block, encoding="utf-8")
    for path, hunk in HUNKS:
        file = folder / path
        file.write_text(patched(file.read_text(encoding="utf-8"), hunk), encoding="utf-8")
    return folder


def test_the_example_is_as_well_formed_as_all_else(copy):
    python = [path for path in FILES if path.endswith(".py")] + [path for path, _ in HUNKS]
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        ran = subprocess.run([sys.executable, "-m", *command, *python], cwd=copy, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
    for path in (path for path in FILES if path.endswith(".cpp")):
        formatted = subprocess.check_output([f"{sys.prefix}/bin/clang-format", path], cwd=copy, text=True)
        assert formatted == FILES[path]


# The C++ kernel becomes a library that has all other functions of the one that is there, as compiling those takes long.
CODE = """
import subprocess, sys
import torch
from tqdm import tqdm
from bench.difference import LARGEST_ERROR
from bench.kernels.jobs import make_job
from bench.kernels.speed import measure
from bench.roofline import Rates
from erniem_fast.native import compiler, library

others, *arguments = sys.argv[1:]
if others:
    built = library.path("cpu")
    built.parent.mkdir(mode=0o700, parents=True)
    flags = [*compiler.cpu_flags(torch.backends.cpu.get_cpu_capability()), "-O1", "-Wl,--no-as-needed"]
    source = str(compiler.SOURCES / "geglu_cpu.cpp")
    subprocess.run([*compiler.cpp(), *flags, source, others, "-o", str(built)], check=True, umask=0o022)
job = make_job("geglu", "base", "512", 64, torch.float32, torch.device("cpu"), compiled=False)
figures = measure(job, LARGEST_ERROR["float32"], 1, Rates(1e9, 1e9), torch.device("cpu"), tqdm(disable=True))
for each in figures:
    print(f"{each.step} by {each.contender}", each.problem or "is timed")

import pytest

sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]))
"""


def test_tests_pass_mutants_are_caught_and_the_bench_runs(copy, tmp_path):
    pytest.importorskip("triton")
    built = library.is_built("cpu")
    environment = {**os.environ, "PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(library.path("cpu")) if built else "", *PYTEST.split()]
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.findall(r"^\S+::(\w+)\[(.*)\] PASSED", ran.stdout, flags=re.MULTILINE)
    tests = {name: [case for test, case in passed if test == name] for name, _ in passed}
    kernels = ["triton", "native"] if built else ["triton"]
    assert len(tests["test_the_battery_passes"]) == 3  # dtypes
    assert len(tests["test_no_mutant_survives"]) == 2 * len(kernels)
    assert {case.partition("geglu-")[2] for case in tests["test_bits_are_the_same_again"]} >= {*kernels}
    steps = ("inference", "forward", "backward")
    timed = {f"{step} by {contender} is timed" for step in steps for contender in ("erniem_fast", "torch eager")}
    assert timed <= {*ran.stdout.splitlines()}


def test_the_compiled_kernel_keeps_the_rules_and_compiles_once(copy, compiling):
    """By the example's launch; for any number of tokens it is compiled once in each direction."""
    code = f"""
import json, sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import torch
from bench.kernels import codegen

def load(name, path):
    spec = spec_from_file_location(name, Path({str(copy)!r}, path))
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

load("erniem_fast.kernels.geglu", "kernels/geglu.py")
launches = load("bench.kernels.launches_of_the_example", "bench/kernels/launches.py")
tabled = [launch for launch in launches.launches("sm_90") if launch[0] == "geglu"]
rows = codegen.rows("sm_90", tabled[:1]) + codegen.rows("gfx942", tabled[:1])
compiled = [
    each.kernel.hash
    for tokens in (1, 15, 16, 5000)
    for each in codegen.compiled("sm_90", launches.launch_geglu, torch.bfloat16, 1024, None, tokens)
]
print(json.dumps([len(tabled), [row.broken_rules() for row in rows], len(compiled), len({{*compiled}})]))
"""
    assert compiling(code) == [3, [[]] * 4, 8, 2]
