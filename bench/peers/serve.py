"""The worker's half of the benchmark: a peer answers requests, one JSON line in on stdin and one out on stdout.

    request                                          reply
    {"op": "export", "model", "exports"}             {"seconds"}: what it makes of the checkpoint lies in `exports`
    {"op": "load", "model", "device", "dtype",       {"versions": {name: version}, "peak_memory": bytes since
     "threads"}                                      the process began}
    {"op": "check", "batches": [{"input_ids",        {"first_seconds"}, of the first batch: every batch ran once, and
     "attention_mask"}], "train", "output",          `output`, an .npy file, holds the hidden states of the real tokens,
     "masked"}                                       float32 (tokens, hidden); to `train`, those after one step
    {"op": "time"}                                   {"seconds": [per batch], "peak_memory": bytes since the check}

A worker ends when stdin closes. An error ends it too, with its traceback on stderr, which the benchmark reports.
This file needs nothing but NumPy, since each peer runs in its own environment.
"""

import json
import os
import platform
import sys
import time

import numpy as np

from bench.peers import memory


class Peer:
    """One way to run the model. A subclass knows how to load it and how to run one batch.

    Attributes:
        masked: whether training predicts masked words.
    """

    masked = False

    def export(self, model, exports):
        """Make what `load` needs of the checkpoint in the folder `model`, once for all (see exports.py)."""

    def load(self, model, device, dtype, threads):
        """Load the checkpoint in the folder `model` and return the versions that matter, by name."""
        raise NotImplementedError

    def prepare(self, input_ids, attention_mask):
        """Turn nested lists of (batch, length) into what `forward` takes; not timed."""
        raise NotImplementedError

    def forward(self, inputs):
        """Run one batch and return its last hidden state, (batch, length, hidden); timed."""
        raise NotImplementedError

    def train(self, inputs):
        """Do one step of training, with dropout, that leaves the weights what they are; timed."""
        raise NotImplementedError

    def learn(self, inputs):
        """What `forward` returns after one step of training that every gradient has a part in, without dropout."""
        raise NotImplementedError

    def to_numpy(self, hidden_state):
        """The result of `forward` as a float32 array."""
        return np.asarray(hidden_state, dtype=np.float32)

    def synchronize(self):
        """Wait until the device has finished."""

    def reset_peak_memory(self):
        memory.reset_peak()

    def peak_memory(self):
        return memory.peak()


def only_float32_on_cpu(device, dtype):
    """End a worker that could not do what is asked for."""
    if (device, dtype) != ("cpu", "float32"):
        sys.exit(f"it serves float32 on a CPU here, not {dtype} on {device}")


class Server:
    """Answers the four requests for one peer."""

    def __init__(self, peer):
        self.peer = peer
        self.inputs = []

    def export(self, model, exports):
        start = time.perf_counter()
        self.peer.export(model, exports)
        return {"seconds": time.perf_counter() - start}

    def load(self, **load):
        versions = {"python": platform.python_version(), **self.peer.load(**load)}
        return {"versions": versions, "peak_memory": memory.peak()}

    def check(self, batches, train, output, masked=False):
        self.peer.masked = masked
        self.inputs = [self.peer.prepare(**batch) for batch in batches]
        self.step = self.peer.train if train else self.peer.forward
        # Freed memory goes back here, and the batches that now run get it again before a time counts.
        self.peer.reset_peak_memory()
        real_tokens, seconds = [], []
        for inputs, batch in zip(self.inputs, batches, strict=True):
            start = time.perf_counter()
            hidden_state = self.peer.to_numpy(self.peer.learn(inputs) if train else self.peer.forward(inputs))
            seconds.append(time.perf_counter() - start)
            real_tokens.append(hidden_state[np.asarray(batch["attention_mask"], dtype=bool)])
        np.save(output, np.concatenate(real_tokens))
        if train:
            self.step(self.inputs[0])
        return {"first_seconds": seconds[0]}

    def time(self):
        seconds = []
        for inputs in self.inputs:
            self.peer.synchronize()
            start = time.perf_counter()
            self.step(inputs)
            self.peer.synchronize()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "peak_memory": self.peer.peak_memory()}


def serve(peer):
    """Answer requests until stdin closes."""
    # Whatever a library prints must not end up between the replies: they get a descriptor of their own.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server(peer)
    answers = {"export": server.export, "load": server.load, "check": server.check, "time": server.time}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("op")](**request)), file=replies, flush=True)
