"""The benchmark's half of the protocol of peers/serve.py: workers are started, asked and ended here."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Iterator

from bench import ROOT
from bench.peers.exports import CALIBRATION

STDERR_LINES = 12
ROUNDED = ("bfloat16", "int8", "float8")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to run the model.

    Attributes:
        name: what the report calls it.
        command: what Python gets to start its worker, a module of bench.peers.
        python: the Python of the environment that the worker runs in.
        environment: environment variables for it, beside our own.
        trains: whether it can train.
        weights: what it makes of them, as in `erniem_fast.optimize`: "bfloat16", "int8" and "float8" round them,
            "packed" keeps float32 in a layout of its own; None leaves them as they are.
    """

    name: str
    command: tuple[str, ...]
    python: pathlib.Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    trains: bool = False
    weights: str | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether it computes with fewer bits than the weights of the checkpoint have."""
        return self.weights in ROUNDED


class WorkerError(Exception):
    """A worker that cannot be started or has died; the message says how."""


class Worker:
    """A running peer.

    Attributes:
        name, weights: the peer's.
        versions: versions of what it runs on, by name.
        load_seconds: from the start of the process until the model was ready, exports apart.
        load_memory: the peak of the process until then, in bytes.
        first_seconds: of the first batch of all; None before it.
    """

    def __init__(self, peer, model, exports, **settings):
        """Start the peer's process and load the model.

        Args:
            peer: who it is.
            model: folder of the checkpoint.
            exports: folder for what is made of it, shared by the workers of a run.
            settings: device, dtype and threads.
        """
        self.first_seconds = None
        self.name = peer.name
        self.weights = peer.weights
        if not peer.python.exists():
            raise WorkerError(
                f"its environment is missing: no {peer.python.parent.parent.name}; `make bench-all` makes it"
            )
        start = time.perf_counter()
        # A file takes any amount of stderr without ever blocking the worker.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [peer.python, *peer.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            encoding="utf-8",
            env={**os.environ, **_module_path(), "HF_HUB_OFFLINE": "1", **peer.environment},
            start_new_session=True,  # Ctrl-C is for the benchmark alone, which then ends its workers
        )
        try:
            export_seconds = self.request("export", model=model, exports=exports)["seconds"]
            loaded = self.request("load", model=model, **settings)
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start - export_seconds
        self.versions, self.load_memory = loaded["versions"], loaded["peak_memory"]

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def request(self, op: str, **arguments) -> dict:
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


@contextlib.contextmanager
def exports_folder(batches: list[dict]) -> Iterator[str]:
    """Lend a temporary folder for what workers make of the checkpoint; those that calibrate read `batches` there."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, CALIBRATION).write_text(json.dumps(batches), encoding="utf-8")
        yield folder


def _module_path():
    """Environment variables with which Python finds the package `bench` and its workers, from whatever folder."""
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *([others] if others else [])])}
