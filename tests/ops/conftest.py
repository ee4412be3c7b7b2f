"""Fixtures that tests of several ops share."""

from dataclasses import replace

import pytest
import torch

from erniem_fast import flags, ops
from erniem_fast.ops.choose import arguments_of
from tests.ops.problems import CPU


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tables():
    """The tables of implementations, free to be changed by a test."""
    kept = {op: dict(table) for op, table in ops.IMPLEMENTATIONS.items()}
    yield ops.IMPLEMENTATIONS
    for op, table in kept.items():
        ops.IMPLEMENTATIONS[op].clear()
        ops.IMPLEMENTATIONS[op].update(table)


def noting(calls, name, like, **fields):
    """An implementation that notes where it runs."""

    def direction(which):
        def run(**values):
            calls.append((name, which))
            function = getattr(like, which)
            return function(**arguments_of(function, values))

        return run

    return replace(like, forward=direction("forward"), backward=direction("backward"), **fields)


@pytest.fixture
def calls(tables, monkeypatch):
    """Notes what runs, with a kernel in front of every table that takes float32 on a CPU alone."""
    for flag in (flags.KERNELS, flags.VERIFY, *flags.OPS.values()):
        monkeypatch.delenv(flag.name, raising=False)
    calls = []

    def refuses(device, dtype):
        return None if (device, dtype) == (CPU, torch.float32) else "it takes float32 on a CPU; use float32"

    for table in tables.values():
        former = {name: table[name] for name in ("torch", "reference")}
        table.clear()
        table["kernel"] = noting(calls, "kernel", former["torch"], refuses=refuses, fuses_bias=True)
        table.update({name: noting(calls, name, each) for name, each in former.items()})
    return calls
