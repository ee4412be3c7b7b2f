"""The scripts in examples/, as modules."""

import socket
import sys
from importlib import import_module

from tests import ROOT


def import_example(name):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]
