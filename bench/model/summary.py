"""From seconds to figures: medians with quartiles, and ratios taken round by round."""

import numpy as np

from bench.model.figures import JobFigures, Latency, PeerFigures
from bench.model.measure import Measurement
from bench.timing import quartiles


def summarise(measurements: list[Measurement], ours: tuple[str, ...]) -> list[JobFigures]:
    """The figures of every job.

    Args:
        measurements: all of one run, those of one job together.
        ours: names of the peers that are ours, one for each form of the weights. A peer is compared with ours of its
            form, or with ours that leaves the weights as they are where that takes no part.
    """
    jobs = {}
    for measurement in measurements:
        jobs.setdefault(measurement.job.name, []).append(measurement)
    return [_summarise_job(entries, ours) for entries in jobs.values()]


def _summarise_job(entries, ours):
    job = entries[0].job
    baselines = {entry.weights: entry for entry in entries if entry.peer in ours}
    return JobFigures(
        name=job.name,
        batch_size=job.spec.batch_size,
        lengths=job.spec.lengths,
        train=job.spec.train,
        batches=len(job.batches),
        rows=job.rows,
        tokens=job.tokens,
        positions=job.positions,
        fill=job.fill,
        peers=[_summarise_peer(entry, baselines.get(entry.weights, baselines.get(None))) for entry in entries],
    )


def _summarise_peer(entry, baseline):
    speedups, memory_ratio = [], None
    if baseline is not None and baseline is not entry:
        # One of the two may have fewer rounds, where it died or the run was interrupted.
        pairs = zip(_tokens_per_second(baseline), _tokens_per_second(entry), strict=False)
        speedups = [ours / theirs for ours, theirs in pairs]
        memory_ratio = baseline.peak_memory / entry.peak_memory if speedups else None
    return PeerFigures(
        peer=entry.peer,
        tokens_per_second=quartiles(_tokens_per_second(entry)) if entry.rounds else None,
        rows_per_second=_rows_per_second(entry) if entry.rounds else None,
        batch_seconds=_latency(entry.rounds) if entry.rounds else None,
        speedup=quartiles(speedups) if speedups else None,
        peak_memory=entry.peak_memory,
        memory_ratio=memory_ratio,
        output_difference=entry.difference,
        problem=entry.problem,
        rounds=entry.rounds,
    )


def _tokens_per_second(entry):
    return [entry.job.tokens / sum(seconds) for seconds in entry.rounds]


def _rows_per_second(entry):
    return float(np.median([entry.job.rows / sum(seconds) for seconds in entry.rounds]))


def _latency(rounds):
    return Latency(*map(float, np.percentile(np.concatenate(rounds), [50, 99])))
