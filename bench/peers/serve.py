"""The worker's half of the benchmark: a peer answers requests, one JSON line in on stdin and one out on stdout.

    request                                          reply
    {"op": "load", "model", "device", "dtype",       {"versions": {name: version}}
     "threads"}
    {"op": "check", "batches": [{"input_ids",        {}: every batch ran once, and `output`, an .npy file, holds the
     "attention_mask"}], "output"}                   hidden states of the real tokens, float32 (tokens, hidden)
    {"op": "time"}                                   {"seconds": [per batch], "peak_memory": bytes since the check}

A worker ends when stdin closes. An error ends it too, with its traceback on stderr, which the benchmark reports.
This file needs nothing but NumPy, since each peer runs in its own environment.
"""

import json
import os
import platform
import sys
import time

import memory
import numpy as np


class Peer:
    """One way to run the model. A subclass knows how to load it and how to run one batch."""

    def load(self, model, device, dtype, threads):
        """Load the checkpoint in the folder `model` and return the versions that matter, by name."""
        raise NotImplementedError

    def prepare(self, input_ids, attention_mask):
        """Turn nested lists of (batch, length) into what `forward` takes; not timed."""
        raise NotImplementedError

    def forward(self, inputs):
        """Run one batch and return its last hidden state, (batch, length, hidden); timed."""
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


class Server:
    """Answers the three requests for one peer."""

    def __init__(self, peer):
        self.peer = peer
        self.inputs = []

    def load(self, model, device, dtype, threads):
        return {"versions": {"python": platform.python_version(), **self.peer.load(model, device, dtype, threads)}}

    def check(self, batches, output):
        self.inputs = [self.peer.prepare(**batch) for batch in batches]
        real_tokens = []
        for inputs, batch in zip(self.inputs, batches, strict=True):
            hidden_state = self.peer.to_numpy(self.peer.forward(inputs))
            real_tokens.append(hidden_state[np.asarray(batch["attention_mask"], dtype=bool)])
        np.save(output, np.concatenate(real_tokens))
        del hidden_state, real_tokens
        self.peer.reset_peak_memory()
        return {}

    def time(self):
        seconds = []
        for inputs in self.inputs:
            self.peer.synchronize()
            start = time.perf_counter()
            self.peer.forward(inputs)
            self.peer.synchronize()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "peak_memory": self.peer.peak_memory()}


def serve(peer):
    """Answer requests until stdin closes."""
    # Whatever a library prints must not end up between the replies: they get a descriptor of their own.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server(peer)
    answers = {"load": server.load, "check": server.check, "time": server.time}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("op")](**request)), file=replies, flush=True)
