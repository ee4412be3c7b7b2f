"""Fixtures that several files of tests share."""

import os

import pytest

# Every checkpoint is a folder of the tests: nothing may be looked up on a network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(params=["1", "0"], ids=["packed", "padded"])
def packed(request, monkeypatch):
    """Runs a test in both layouts; True where padding is left out of the computation."""
    monkeypatch.setenv("ERNIEM_FAST_PACKING", request.param)
    return request.param == "1"
