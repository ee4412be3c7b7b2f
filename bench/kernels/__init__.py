"""The ops one by one: how fast they are, and what the Triton kernels compile to."""
