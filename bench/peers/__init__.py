"""The worker processes, one file for each way to run the model; they start as `python -m bench.peers.NAME`."""
