"""Fixtures that several tests of the benchmarks share."""

import pathlib
import sys
import types

import pytest
from runs import TINY

from bench.model import throughput
from bench.model.figures import ModelRun
from bench.model.workers import Peer
from bench.record import read

# A worker with no model in it: every hidden state is VALUE and every batch takes SECONDS, whatever the clock says.
FAKE = """
import json, os, signal, sys, time
import numpy as np
turn = 0
for line in sys.stdin:
    request = json.loads(line)
    reply = {}
    if request["op"] == "export":
        reply = {"seconds": 0}
    if request["op"] == "load":
        reply = {"versions": {"python": "3"}, "peak_memory": 2 * MEMORY}
    if request["op"] == "check":
        batches = request["batches"]
        reply = {"first_seconds": 0.25}
        np.save(request["output"], np.full((sum(np.sum(b["attention_mask"]) for b in batches), 1), VALUE, np.float32))
    if request["op"] == "time":
        turn += 1
        ON_TURN
        reply = {"seconds": [SECONDS] * len(batches), "peak_memory": MEMORY}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    def make(name, value=1.0, seconds=0.5, memory=2**30, on_turn="pass"):
        text = FAKE
        for word, replacement in {"VALUE": value, "SECONDS": seconds, "MEMORY": memory, "ON_TURN": on_turn}.items():
            text = text.replace(word, str(replacement))
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        return Peer(name, (str(script),), pathlib.Path(sys.executable))

    return make


@pytest.fixture
def benchmark(tmp_path):
    """Runs the benchmark on the tiny checkpoint with given peers; returns its exit code and its figures."""

    def run(*peers, options=("--batch-size", "4", "--lengths", "text", "--sentences", "8", "--rounds", "3")):
        output = tmp_path / "results"
        code = throughput.main([*options, "--model", str(TINY), "--threads", "1", "--output", str(output)], peers)
        path = output / f"{'training' if '--train' in options else 'throughput'}-tiny-float32.json"
        return code, read(ModelRun, path) if path.exists() else None

    return run


@pytest.fixture
def arguments(tmp_path):
    return types.SimpleNamespace(
        model=TINY, size="base", dtype="float32", device="cpu", threads=1, output=tmp_path / "results", long=False
    )
