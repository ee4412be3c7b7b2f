"""Builds, loads and calls csrc/: one library for the CPU, one for CUDA devices.

Both have a plain C interface and include nothing of torch, so that a build outlives an upgrade of torch or Python. The
CPU library takes its threads from torch, through one function of torch's stable ABI.
"""
