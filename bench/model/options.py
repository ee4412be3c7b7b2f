"""The options that several benchmarks of the model share."""

import argparse
import contextlib
import pathlib

import torch

from bench.model.checkpoint import SIZES, random_checkpoint, read_config

DTYPES = ("float32", "bfloat16", "float16")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that every run of the model has: its weights, and where and how it runs."""
    add_weights_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    run.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add_common_options(run)


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Random weights of a size, or those of a checkpoint."""
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--size", choices=SIZES, default="base", help="random weights (default: base)")
    model.add_argument(
        "--model", type=checkpoint_folder, metavar="DIR", help="folder of a real ERNIE-M checkpoint with its tokenizer"
    )


def add_common_options(run: argparse._ArgumentGroup) -> None:
    """The options that runs on given weights have too."""
    run.add_argument("--threads", type=positive, metavar="N", help="CPU threads of each peer (default: one per core)")
    run.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="folder for results (default: bench/results/MACHINE)"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def lengths(text: str) -> str:
    kind, _, number = text.partition(":")
    if text in ("text", "sorted", "modernbert") or (kind == "fixed" and number.isdecimal() and int(number) > 0):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of text, sorted, modernbert and fixed:N with N of 1 or more")


def checkpoint_folder(text: str) -> pathlib.Path:
    try:
        read_config(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return pathlib.Path(text)


def device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} CUDA devices here, so no {text!r}")
    return text


def checkpoint(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[pathlib.Path]:
    """A context that lends the folder of the checkpoint that was asked for."""
    return contextlib.nullcontext(arguments.model) if arguments.model else random_checkpoint(arguments.size)
