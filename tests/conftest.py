"""Fixtures that several files of tests share.

Without a GPU, the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
"""

import contextlib
import os

import pytest
import torch

from erniem_fast import extension

# Every checkpoint is a folder of the tests: nothing may be looked up on a network.
os.environ["HF_HUB_OFFLINE"] = "1"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    """Builds the native library, so that tests of every implementation find it; without a compiler they skip it."""
    with contextlib.suppress(extension.BuildError):
        extension.build(["cpu"])


@pytest.fixture
def poisoned_memory():
    """Fills memory that is not initialised with NaN, so that nothing a kernel forgets to write goes unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["auto", "off"], ids=["kernels", "plain"])
def kernels(request, monkeypatch):
    """Runs a test by what this machine prefers, and in plain PyTorch."""
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", request.param)


@pytest.fixture(params=["1", "0"], ids=["packed", "padded"])
def packed(request, monkeypatch):
    """Runs a test in both layouts; True where padding is left out of the computation."""
    monkeypatch.setenv("ERNIEM_FAST_PACKING", request.param)
    return request.param == "1"
