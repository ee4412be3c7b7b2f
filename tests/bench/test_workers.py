"""The protocol of workers, and what becomes of one that dies."""

import contextlib
import os
import pathlib
import sys

import numpy as np
import pytest

from bench.model.jobs import pad
from bench.model.workers import Peer, Worker, WorkerError


def test_a_worker_that_was_killed_between_two_requests_is_told_from_one_that_failed(fake):
    worker = Worker(fake("mortal"), "model", "exports")
    worker.process.kill()
    worker.process.wait()
    assert worker.dead
    with pytest.raises(WorkerError, match=r"was killed by signal 9 in 'time'; the end of its stderr:\n\(nothing\)"):
        worker.request("time")
    worker.close()


SERVED = """
import numpy as np
from bench.peers.serve import Peer, serve
class Talkative(Peer):
    def load(self, model, device, dtype, threads):
        np.ones(2**25).sum()  # 256 MiB, freed at once
        return {"model": model, "device": device, "dtype": dtype, "threads": threads}
    def prepare(self, input_ids, attention_mask):
        return np.array(input_ids)
    def forward(self, inputs):
        print("a library that prints")
        return np.stack([inputs, -inputs], axis=-1)
serve(Talkative())
"""


def test_the_server_saves_real_tokens_only_and_forgets_the_memory_of_loading(tmp_path):
    script = tmp_path / "talkative.py"
    script.write_text(SERVED)
    settings = {"device": "cpu", "dtype": "float32", "threads": 3}
    peer = Peer("talkative", (str(script),), pathlib.Path(sys.executable))
    with contextlib.closing(Worker(peer, "m", "e", **settings)) as worker:
        assert {name: worker.versions[name] for name in settings} == settings
        assert worker.versions["model"] == "m"
        output = tmp_path / "output.npy"
        worker.request("check", batches=[pad([[5, 6, 7], [8]]), pad([[9]])], train=False, output=str(output))
        assert np.load(output).tolist() == [[5, -5], [6, -6], [7, -7], [8, -8], [9, -9]]
        reply = worker.request("time")
    assert len(reply["seconds"]) == 2
    assert min(reply["seconds"]) > 0
    # Python and NumPy take 30 MiB; only Linux forgets a peak.
    assert reply["peak_memory"] < (150 if sys.platform == "linux" else 1000) * 2**20


def test_ctrl_c_in_a_terminal_does_not_reach_the_workers(fake):
    with contextlib.closing(Worker(fake("old"), "model", "exports")) as worker:
        assert os.getsid(worker.process.pid) == worker.process.pid != os.getsid(0)
