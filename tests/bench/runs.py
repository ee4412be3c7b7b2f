"""What several tests of the benchmarks measure and report."""

from bench import ROOT
from bench.machine import Machine
from bench.model.figures import JobFigures, LoadedPeer, ModelRun, PeerFigures
from bench.model.jobs import Job, Spec, pad
from bench.model.measure import Measurement
from bench.record import Settings
from bench.timing import Quartiles

TINY = ROOT / "tests/golden/tiny"


def measured(peer, rounds, peak_memory=100, weights=None):
    """A measurement of a job of 30 real tokens in two batches."""
    job = Job(Spec(2, "text", 4, len(rounds)), [pad([[5] * 10, [5] * 5]), pad([[5] * 7, [5] * 8])])
    return Measurement(job, peer, weights, rounds=rounds, peak_memory=peak_memory)


def run_of(*jobs):
    """A run of the base model."""
    peers = [
        LoadedPeer("erniem_fast", {"python": "3.11", "transformers": "5"}, 1.0, 0.5, 2**31),
        LoadedPeer("old", {"openvino": "1"}, 1.5, 0.5),
    ]
    return ModelRun(
        name="rivals",
        date="2026-11-23T10:00:00+00:00",
        machine=Machine("A CPU", 2, "AVX2", 24, None, "Linux"),
        settings=Settings("base, random weights", "float32", "cpu", 2),
        peers=peers,
        absent=[],
        interrupted=False,
        jobs=list(jobs),
    )


def job(name, **ratios):
    """A job of erniem_fast and others that are slower by these ratios; None for one that was not measured."""
    peers = [
        peer("erniem_fast", None),
        *(peer(other, ratio, measured=ratio is not None) for other, ratio in ratios.items()),
    ]
    size, _, lengths = name.partition(" x ")
    return JobFigures(name, int(size), lengths, False, 1, int(size), 900, 2000, 0.45, peers)


def peer(name, ratio, measured=True):
    rate = Quartiles(900.0, 1000.0, 1100.0) if measured else None
    return PeerFigures(
        peer=name,
        tokens_per_second=rate,
        rows_per_second=None,
        batch_seconds=None,
        speedup=ratio and Quartiles(ratio, ratio, ratio),
        peak_memory=None,
        memory_ratio=None,
        output_difference=None,
        problem=None,
        rounds=[[1.0]] if measured else [],
    )
