"""The commands of `python -m erniem_fast`."""

import os
import subprocess
import sys


def run(*arguments, **environment):
    command = [sys.executable, "-m", "erniem_fast", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
