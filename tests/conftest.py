"""Fixtures that several files of tests share.

Without a GPU, the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
"""

import contextlib
import os
import zlib
from importlib.util import find_spec

import pytest
import torch

from tests.compiling import compiling_process
from tests.interpreter import make_faster

# Every checkpoint is a folder of the tests: nothing may be looked up on a network.
os.environ["HF_HUB_OFFLINE"] = "1"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What cuBLAS has to be told before torch calls it in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_runtest_setup(item):
    # Each test draws its own numbers, whichever tests ran before it.
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on a GPU, and without one in the interpreter, so that the test's own code is tried everywhere."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def compiling():
    """Runs code in a process that compiles kernels, and returns the JSON that the code prints."""
    with compiling_process() as run:
        yield run


def share_threads(processes):
    """Divides the threads of torch, here and in processes that tests start, between the processes of pytest-xdist.

    Each has two at least, because one thread does not show whether work is divided rightly.
    """
    if processes > 1:
        threads = max(2, torch.get_num_threads() // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_configure(config):
    """Builds the native library, so that tests of every implementation find it; without a compiler they skip it."""
    share_threads(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    from erniem_fast.native.build import build  # imports Triton, which must find the setting above
    from erniem_fast.native.library import BuildError

    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        make_faster()
    with contextlib.suppress(BuildError):
        build(["cpu"])


@pytest.fixture
def poisoned_memory():
    """Fills memory that is not initialised with NaN, so that nothing a kernel forgets to write goes unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
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
