"""`python -m erniem_fast verify`: every kernel that runs here beside the reference, or a model beside the stock one."""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from .. import modeling
from ..conversion.files import find_folder
from ..optimize import FORMS, optimize
from . import battery
from .models import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a checkpoint that is compared with the stock model")
    parser.add_argument("--weights", choices=FORMS, help="the form of the model's weights, as optimize takes it")
    parser.add_argument("-v", "--verbose", action="store_true", help="print each check, not only those that fail")


def run(arguments: argparse.Namespace) -> int:
    """Verifies; returns the exit status."""
    if arguments.model is None and arguments.weights is not None:
        print(
            f"--weights {arguments.weights} is a form of a model's weights; name the model by --model.", file=sys.stderr
        )
        return 1
    if arguments.model is None:
        return _verify_kernels(arguments.verbose)
    return _verify_model(arguments.model, arguments.weights, arguments.verbose)


def _verify_model(folder: str, weights: str | None, verbose: bool) -> int:
    try:
        found = verify(optimize(_load(folder), weights))
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(found if verbose or not found else found.summary())
    return 0 if found else 1


def _load(folder: str | Path) -> transformers.PreTrainedModel:
    """The model that a checkpoint names, on a GPU if there is one."""
    folder = find_folder(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None) or getattr(modeling, name, transformers.AutoModel)
    return kind.from_pretrained(folder).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _verify_kernels(verbose: bool = False) -> int:
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        print(f"{device} ({torch.cuda.get_device_name(device)})")
    else:
        _interpret_triton()
        device = torch.device("cpu")
        print("No GPU: what is written in Triton runs in Triton's interpreter.")
    return 0 if battery.verify(device, verbose) else 1


def _interpret_triton() -> None:
    """Starts the command again with TRITON_INTERPRET=1, because torch has imported Triton by now."""
    if find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1"})
