"""A process that compiles kernels for GPUs that are not here, as the tests' own may interpret them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests import ROOT

# The first import tells Triton to compile. After it: runs the code of each line, and answers with what that printed,
# and with the error that it raised.
SCRIPT = """
import bench.kernels.codegen
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(json.loads(line), {})
        except Exception:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


@contextmanager
def compiling_process() -> Iterator[Callable[[str], object]]:
    """A function that runs code in the process, which stays the same, and returns the JSON that the code prints."""
    command, environment = [sys.executable, "-c", SCRIPT], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def run(code: str) -> object:
            print(json.dumps(code), file=process.stdin, flush=True)
            printed, error = json.loads(process.stdout.readline())
            assert error is None, error
            return json.loads(printed)

        yield run
