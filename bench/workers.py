"""The benchmark's half of the protocol of peers/serve.py: workers are started, asked and buried here."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STDERR_LINES = 12


@dataclasses.dataclass(frozen=True)
class Peer:
    """A rival by name: the script that runs it and the Python of the environment it runs in."""

    name: str
    script: pathlib.Path
    python: pathlib.Path


OURS = Peer("erniem_fast", ROOT / "bench/peers/ours.py", pathlib.Path(sys.executable))
PEERS = [
    OURS,
    Peer("transformers 4.57.6", ROOT / "bench/peers/transformers4.py", ROOT / ".venv-peers/bin/python"),
]


class WorkerError(Exception):
    """A worker that cannot be started or has died; the message says how."""


class Worker:
    """A running peer.

    Attributes:
        name: the peer's name.
        versions: versions of what it runs on, by name.
        load_seconds: from the start of the process until the model was ready.
    """

    def __init__(self, peer, **load):
        """Start the peer's process and load the model: `load` holds the arguments of the protocol's "load"."""
        self.name = peer.name
        if not peer.python.exists():
            raise WorkerError(f"its environment is missing: no {peer.python.parent.parent.name}; `make bench` makes it")
        start = time.perf_counter()
        # A file takes any amount of stderr without ever blocking the worker.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [peer.python, peer.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            encoding="utf-8",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C is for the benchmark alone, which then ends its workers
        )
        try:
            self.versions = self.request("load", **load)["versions"]
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    @property
    def dead(self):
        return self.process.poll() is not None

    def request(self, op, **arguments):
        """Ask for one thing and wait for the reply.

        Raises:
            WorkerError: the worker died; the message ends with the last lines of its stderr.
        """
        try:
            print(json.dumps({"op": op, **arguments}), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise WorkerError(self._last_words(op))
        return json.loads(reply)

    def _last_words(self, op):
        code = self.process.wait()
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()[-STDERR_LINES:]
        return "\n".join([f"{end} in {op!r}; the end of its stderr:", *(lines or ["(nothing)"])])

    def close(self):
        """End the process: at once, since it holds nothing worth saving."""
        self.process.kill()
        self.process.communicate()
        self.stderr.close()
