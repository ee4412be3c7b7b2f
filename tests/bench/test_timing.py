"""Seconds of calls, and their quartiles."""

import pytest
import torch

from bench import timing
from bench.timing import Quartiles, quartiles

CPU = torch.device("cpu")


def test_quartiles_interpolate_as_numpy_does():
    assert quartiles([4.0, 1.0, 2.0, 3.0]) == Quartiles(1.75, 2.5, 3.25)


@pytest.fixture
def clock(monkeypatch):
    """Makes every call take as many seconds as it returns."""
    monkeypatch.setattr(timing, "seconds_of", lambda call, device, flush: call())


def test_calls_take_turns_in_alternating_order(clock):
    called = []
    calls = [lambda: called.append("a") or 1.0, lambda: called.append("b") or 2.0]
    assert timing.take_turns(calls, 2, CPU) == [[1.0, 1.0], [2.0, 2.0]]
    assert "".join(called) == "ba" + "ab" + "ba" + "ab" + "ba"
