"""The CPU's native library once more, built so that it checks addresses and undefined behaviour as it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from erniem_fast.native import compiler, library
from tests import ROOT

FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]

# What the battery has no case of, and whole layers.
TESTS = {
    "native/test_embeddings.py": [
        "test_every_value_of_a_half_is_read_and_rounded_as_by_torch",
        "test_rows_out_of_range_are_never_read",
        "test_inputs_need_not_be_contiguous_nor_aligned",
    ],
    "native/test_function.py": [
        "test_a_tensor_that_is_missing_is_refused_by_its_name",
        "test_inputs_are_read_in_whatever_form_they_come",
    ],
    "native/test_int8.py": [
        "test_largest_integers",
        "test_a_token_does_not_depend_on_others",
        "test_a_layer_has_the_bits_of_its_ops",
        "test_activations",
        "test_a_sequence_with_nan_disturbs_no_other",
    ],
    "native/test_layer.py": [
        "test_it_is_what_the_ops_are_one_by_one",
        "test_pruned_heads",
        "test_masks_with_holes_and_without_packing",
    ],
    "ops/test_attention.py": ["test_no_sequences", "test_sequences_without_keys_give_zeros"],
    "ops/test_bias_gelu.py": ["test_activations_of_large_values"],
}

# An error ends the process. Of the embeddings' tests those on the CPU are wanted, of the ops' the native ones.
SCRIPT = f"""
import sys, pytest, torch
from erniem_fast.native import compiler
from erniem_fast.native.build import build
from erniem_fast.verification.battery import battery

flags = compiler.cpu_flags
compiler.cpu_flags = lambda capability: [*flags(capability), *{FLAGS}]
build(["cpu"])
checks = [check for check in battery(torch.device("cpu")) if check.implementation == "native"]
assert {{check.op for check in checks}} == {{"embeddings", "attention", "bias_gelu", "add_norm", "product", "int8"}}
for check in checks:
    assert all(comparison.holds for comparison in check.run().values()), check
tests = {[f"{ROOT / 'tests' / file}::{name}" for file, names in TESTS.items() for name in names]}
unwanted = "cuda or triton or -torch or reference"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", f"not ({{unwanted}})", *tests]))
"""


def runtime() -> Path:
    """The library that has to be in a process before any other; relative where the compiler has none."""
    command = [*compiler.cpp(), "-print-file-name=libasan.so"]
    return Path(subprocess.check_output(command, text=True).strip())


def test_sanitizers_find_nothing(tmp_path):
    if not library.is_built("cpu") or not runtime().is_absolute():
        pytest.skip("no compiler, or none that has sanitizers")
    settings = {"LD_PRELOAD": str(runtime()), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
