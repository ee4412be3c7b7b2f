"""From seconds to figures: medians with quartiles, and ratios taken round by round. The result is the JSON file."""

import numpy as np


def quartiles(values):
    """First quartile, median and third quartile by name."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {"q1": float(q1), "median": float(median), "q3": float(q3)}


def tokens_per_second(measurement):
    """Real tokens per second of each round; padding earns nothing."""
    return [measurement.job.tokens / sum(seconds) for seconds in measurement.rounds]


def summarise(measurements, ours):
    """The figures of every job, ready for JSON.

    Args:
        measurements: all of one run, those of one job together.
        ours: names of the peers that are ours.

    Returns:
        One dict per job, with one dict per peer. `speedup` is our rate over the peer's, paired round by round, and
        `memory_ratio` our peak over the peer's; both are None where one of the two was not measured. Peers that round
        to 8 bits are compared with ours that does, where that takes part.
    """
    jobs = {}
    for measurement in measurements:
        jobs.setdefault(measurement.job.name, []).append(measurement)
    return [_summarise_job(entries, ours) for entries in jobs.values()]


def _summarise_job(entries, ours):
    job = entries[0].job
    baselines = {entry.int8: entry for entry in entries if entry.peer in ours}
    return {
        "name": job.name,
        "batch_size": job.spec.batch_size,
        "lengths": job.spec.lengths,
        "train": job.spec.train,
        "batches": len(job.batches),
        "rows": job.rows,
        "tokens": job.tokens,
        "positions": job.positions,
        "fill": job.fill,
        "peers": [_summarise_peer(entry, baselines.get(entry.int8, baselines.get(False))) for entry in entries],
    }


def _summarise_peer(entry, baseline):
    speedups, memory_ratio = [], None
    if baseline is not None and baseline is not entry:
        # One of the two may have fewer rounds, where it died or the run was interrupted.
        pairs = zip(tokens_per_second(baseline), tokens_per_second(entry), strict=False)
        speedups = [ours / theirs for ours, theirs in pairs]
        memory_ratio = baseline.peak_memory / entry.peak_memory if speedups else None
    return {
        "peer": entry.peer,
        "tokens_per_second": quartiles(tokens_per_second(entry)) if entry.rounds else None,
        "rows_per_second": _rows_per_second(entry) if entry.rounds else None,
        "batch_seconds": _latency(entry.rounds) if entry.rounds else None,
        "speedup": quartiles(speedups) if speedups else None,
        "peak_memory": entry.peak_memory,
        "memory_ratio": memory_ratio,
        "output_difference": entry.difference,
        "problem": entry.problem,
        "rounds": entry.rounds,
    }


def _rows_per_second(entry):
    return float(np.median([entry.job.rows / sum(seconds) for seconds in entry.rounds]))


def _latency(rounds):
    """Median and 99th percentile of the time that one batch takes, over all batches of all rounds."""
    median, p99 = np.percentile(np.concatenate(rounds), [50, 99])
    return {"median": float(median), "p99": float(p99)}
