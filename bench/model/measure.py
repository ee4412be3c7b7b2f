"""One job: outputs are compared, then the peers take turns, round after round, so that all meet the same noise."""

import dataclasses
import pathlib
import tempfile

import numpy as np
import torch
from torch import Tensor

from bench.difference import difference
from bench.model.jobs import Job
from bench.model.workers import Worker, WorkerError

# Largest difference of a hidden state between two peers, in units of the reference's root mean square. Right peers were
# seen to differ by 5e-6, 0.1, 0.012, 0.29 and, where a CPU multiplied what is rounded as on a GPU, 0.58 (base size,
# 2,600 tokens); a wrong one is off by 1 and more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.03, "int8": 0.6, "float8": 0.9}


@dataclasses.dataclass
class Measurement:
    """What one peer did in one job.

    Attributes:
        weights: what the peer makes of them (see workers.Peer).
        difference: largest difference from the reference's output (see TOLERANCE); None for the reference itself.
        rounds: seconds of each batch, per round.
        peak_memory: bytes, at any time of the rounds; None before the first round.
        problem: why it was not measured, or not to the end.
    """

    job: Job
    peer: str
    weights: str | None = None
    difference: float | None = None
    rounds: list[list[float]] = dataclasses.field(default_factory=list)
    peak_memory: int | None = None
    problem: str | None = None


def measure(job: Job, workers: list[Worker], dtype: str, measurements: list[Measurement], bar) -> None:
    """Measure every worker in one job.

    Args:
        job: what to run.
        workers: who runs it, the reference first. One that dies is reported in that job and in those that it misses.
        dtype: of the weights; decides how far outputs may differ.
        measurements: grows by one per worker at the start, so that an interrupted run keeps what it has.
        bar: tqdm's bar, which moves by one per worker and turn.
    """
    entries = [(worker, Measurement(job, worker.name, worker.weights)) for worker in workers]
    measurements.extend(entry for _, entry in entries)
    with tempfile.TemporaryDirectory() as folder:
        _check(entries, dtype, pathlib.Path(folder, "output.npy"), bar)
    for turn in range(1, job.spec.rounds + 1):
        bar.set_description(f"{job.name}, round {turn} of {job.spec.rounds}")
        for worker, entry in entries if turn % 2 else entries[::-1]:
            if entry.problem is None:
                _take_turn(worker, entry)
            bar.update()


def _check(entries, dtype, output, bar):
    """Run every batch on every worker, which also warms it up, and refuse those whose real tokens differ from ours."""
    reference = None
    for worker, entry in entries:
        bar.set_description(f"{entry.job.name}, comparing outputs")
        hidden_states = _run(worker, entry, output)
        bar.update()
        if hidden_states is None:
            continue
        if reference is None:
            reference, reference_name = hidden_states, worker.name
            continue
        entry.difference = difference(hidden_states, reference)
        allowed = TOLERANCE.get(worker.weights, TOLERANCE[dtype])
        if not entry.difference <= allowed:  # NaN is refused too
            entry.problem = (
                f"{worker.name} refused: its output differs from that of {reference_name} by {entry.difference:.2g}"
                f" (largest difference over root mean square; {allowed:g} is allowed), so its time would mean nothing"
            )


def _run(worker, entry, output) -> Tensor | None:
    """The worker's hidden states of all real tokens, or None where it is dead."""
    if worker.dead:
        entry.problem = f"{worker.name} not measured: it died in an earlier job"
        return None
    try:
        spec = entry.job.spec
        options = {"train": spec.train, "masked": spec.masked, "output": str(output)}
        reply = worker.request("check", batches=entry.job.batches, **options)
    except WorkerError as error:
        entry.problem = f"{worker.name} {error}"
        return None
    worker.first_seconds = worker.first_seconds or reply["first_seconds"]
    return torch.from_numpy(np.load(output))


def _take_turn(worker, entry):
    try:
        reply = worker.request("time")
    except WorkerError as error:
        entry.problem = f"{worker.name} {error}"
        return
    entry.rounds.append(reply["seconds"])
    entry.peak_memory = reply["peak_memory"]
