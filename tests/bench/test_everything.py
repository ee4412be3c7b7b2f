"""All parts of the benchmark in one command."""

import pytest
from runs import TINY

from bench.model import everything
from bench.model.jobs import Spec


@pytest.fixture
def parts(monkeypatch):
    """Two parts that note who ran, instead of measuring."""
    ran, codes = [], {}
    monkeypatch.setattr(everything, "PARTS", tuple((name, "original", everything.INFERENCE) for name in ("a", "b")))
    monkeypatch.setattr(everything, "run_and_save", lambda name, *_: ran.append(name) or codes.get(name, 0))
    monkeypatch.setattr(everything.breakdown, "run_and_save", lambda *_: ran.append("breakdown"))
    return ran, codes


def test_all_parts_run_and_the_worst_is_told(arguments, parts):
    ran, codes = parts
    codes["a"] = 1
    assert everything.run_parts(arguments, TINY) == 1
    assert ran == ["a", "b", "breakdown"]


def test_ctrl_c_ends_the_parts_that_are_left(arguments, parts):
    ran, codes = parts
    codes["a"] = 130
    assert everything.run_parts(arguments, TINY) == 130
    assert ran == ["a"]


def test_what_rounds_is_measured_on_a_cpu_only(arguments, parts, monkeypatch):
    ran, _ = parts
    monkeypatch.setattr(everything, "PARTS", (("a", "rounded", ()), ("b", "unrounded", ())))
    everything.run_parts(arguments, TINY)
    arguments.device = "cuda"
    everything.run_parts(arguments, TINY)
    assert ran == ["a", "b", "breakdown", "b"]


def test_a_long_run_adds_batches_of_128():
    assert everything.lengthen(everything.INFERENCE)[-1] == Spec(128, "text", rows=128, rounds=7)
    assert {spec.rounds for spec in everything.lengthen(everything.INFERENCE)} == {7}
    (training,) = everything.lengthen(everything.TRAINING)
    assert training == Spec(32, "text", rows=64, rounds=7, train=True)
