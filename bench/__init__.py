"""The benchmarks: `python -m bench` lists them. Run them from the root of the repository, where this package lies."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
INTERRUPTED = 130  # the exit code after Ctrl-C
