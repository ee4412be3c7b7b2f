"""Whether kernels compute what the reference does: the battery of hard cases, and when a result is equivalent."""
