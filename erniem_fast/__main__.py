"""`python -m erniem_fast`: `status` shows which implementation runs each op here, and why; `build` compiles the native
libraries and times the libraries for matrix products; `verify` compares every kernel that runs here with the
reference; `convert` writes a checkpoint as another library or model reads it; `extract` finds what a schema names in a
file of texts."""

import argparse
import os
import platform
import sys
from importlib.util import find_spec

import torch
import transformers

from . import flags, ops
from .conversion import command as conversion
from .extraction import command as extraction
from .inference import BFloat16Linear, linear_kind
from .inference_gpu import GPU_LINEARS, gpu_objection
from .matmul import fastest, may_choose
from .native import library, packed
from .native.build import build
from .ops.choose import choose
from .optimize import bfloat16_objection
from .verify.battery import verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m erniem_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="show versions, flags, and which implementation runs each op here")
    commands.add_parser(
        "build", help="compile the native libraries for this machine's devices, and time the libraries for products"
    )
    commands.add_parser("verify", help="compare every kernel that runs here with the reference, forward and backward")
    conversion.add_arguments(
        commands.add_parser("convert", help="write a checkpoint of PaddleNLP, Baidu, XLM-RoBERTa or ERNIE-M as another")
    )
    extraction.add_arguments(commands.add_parser("extract", help="find what a schema names in a file of texts"))
    arguments = parser.parse_args()
    run = {
        "status": _status,
        "build": _build,
        "verify": _verify,
        "convert": conversion.run,
        "extract": extraction.run,
    }[arguments.command]
    return run(arguments)


def _status(_: argparse.Namespace) -> int:
    print(status())
    return 0


def _build(_: argparse.Namespace) -> int:
    try:
        print("compiling what is missing for this machine, which takes up to a minute", flush=True)
        for device, path in build().items():
            print(f"{device}: {path}")
    except library.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print("timing the libraries for matrix products, which takes about ten seconds", flush=True)
    fastest.measure_all()
    print("products: measured; `python -m erniem_fast status` shows the choice")
    return 0


def _verify(_: argparse.Namespace) -> int:
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        print(f"{device} ({torch.cuda.get_device_name(device)})")
    else:
        _interpret_triton()
        device = torch.device("cpu")
        print("No GPU: what is written in Triton runs in Triton's interpreter.")
    return 0 if verify(device) else 1


def _interpret_triton() -> None:
    """Starts the command again with TRITON_INTERPRET=1, because torch has imported Triton by now."""
    if find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1"})


def status() -> str:
    """Versions, flags, and for each device and op the implementation that runs it, and why others cannot."""
    flags.check_names()
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        *(f"{name:24} {flags.read(flag):10} {flag.effect}" for name, flag in flags.FLAGS.items()),
    ]
    for device in [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        lines += ["", f"{device} ({name})"]
        for op, implementations in ops.IMPLEMENTATIONS.items():
            lines += [f"  {op:12} {_chosen(op, device)}"]
            for implementation_name, implementation in implementations.items():
                reason = implementation.refuses(device, torch.float32)
                lines += [f"    {implementation_name:10} {reason or 'available'}"]
        lines += _products() + _weights() if device.type == "cpu" else _weights_on_gpu(device)
    return "\n".join(lines)


def _products() -> list[str]:
    if not may_choose():
        return ["  products     run by torch, as the flags or torch's settings ask"]
    title = f"  products in float32, by number of tokens, with {torch.get_num_threads()} threads"
    return [title, *(f"    {line}" for line in fastest.report())]


def _weights() -> list[str]:
    """What serves the weights of `optimize` that round."""
    missing = packed.objection()
    products = f"native ({packed.kernels(torch.int8)[-1]})" if missing is None else f"by torch: {missing}"
    by = "native" if linear_kind("bfloat16") is BFloat16Linear else "by oneDNN"
    rounded = {"bfloat16": bfloat16_objection() or by, "int8": products}
    return ["  weights by optimize", *(f"    {name:10} {each}" for name, each in rounded.items())]


def _weights_on_gpu(device: torch.device) -> list[str]:
    reasons = {weights: gpu_objection(weights, device) for weights in GPU_LINEARS}
    return ["  weights by optimize", *(f"    {name:10} {reason or 'available'}" for name, reason in reasons.items())]


def _chosen(op: str, device: torch.device) -> str:
    try:
        return "runs by " + choose(op, device, torch.float32)
    except RuntimeError as error:
        return f"cannot run: {error}"


if __name__ == "__main__":
    sys.exit(main())
