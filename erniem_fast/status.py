"""What runs here, and why: the text of `python -m erniem_fast status`."""

import platform
from collections.abc import Iterator

import torch
import transformers

from . import flags, ops
from .inference import BFloat16Linear, linear_kind
from .inference_gpu import GPU_LINEARS, gpu_objection
from .matmul import fastest, may_choose
from .native import build, library, packed
from .ops.choose import choose, missing
from .optimize import bfloat16_objection

# What has run on which GPU: see bench/results/nvidia-*/gpu-correctness.md, and change this with them.
_ON_GPUS = """\
GPUs: kernels, whole models, CUDA graphs and 8-bit weights ran on an H200 (2026-11-27), where all 465 checks passed.
      An earlier version ran on an H100. On others, first run `python -m erniem_fast verify`, and `verify --model DIR`
      with your model."""

# The flags that make models slower, with the values that do.
_SLOW = {flags.KERNELS: ("off",), flags.PACKING: ("0",), flags.VERIFY: ("1",)} | dict.fromkeys(
    flags.OPS.values(), ("torch", "reference")
)


def status() -> str:
    """Versions, flags, and for each device and op the implementation that runs it, and why others cannot.

    The last lines are a verdict: whether everything runs by kernels, or why not and what to do.
    """
    flags.check_names()
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        *(f"{name:24} {flags.read(flag):10} {flag.effect}" for name, flag in flags.FLAGS.items()),
    ]
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        lines += ["", f"{device} ({_name(device)})"]
        for op, implementations in ops.IMPLEMENTATIONS.items():
            lines += [f"  {op:12} {_chosen(op, device)}"]
            for implementation_name, implementation in implementations.items():
                reason = implementation.refuses(device, torch.float32)
                lines += [f"    {implementation_name:10} {reason or 'available'}"]
        lines += _products() + _weights() if device.type == "cpu" else _weights_on_gpu(device)
    return "\n".join([*lines, "", _ON_GPUS, *(line for device in devices for line in _verdict(device))])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _products() -> list[str]:
    if not may_choose():
        return ["  products     run by torch, as the flags or torch's settings ask"]
    title = f"  products in float32, by number of tokens, with {torch.get_num_threads()} threads"
    return [title, *(f"    {line}" for line in fastest.report())]


def _weights() -> list[str]:
    """What serves the weights of `optimize` that round."""
    objection = packed.objection()
    products = f"native ({packed.kernels(torch.int8)[-1]})" if objection is None else f"by torch: {objection}"
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


# --- The verdict -----------------------------------------------------------------------------------------------------


def _verdict(device: torch.device) -> Iterator[str]:
    """Whether a device runs everything by kernels; else why not, and the remedy."""
    refused = [found for op in ops.IMPLEMENTATIONS if (found := _chosen(op, device)).startswith("cannot")]
    slow = [f"{flag.name}={flags.read(flag)}" for flag, values in _SLOW.items() if flags.read(flag) in values]
    lacking = missing(device) if not refused else {}
    for each in refused:
        yield f"{device}: a model {each}"
    if slow:
        yield f"{device}: {', '.join(slow)} {'slows' if len(slow) == 1 else 'slow'} models down; unset to run fast."
    if device.type == "cpu" and not library.is_built("cpu"):
        yield f"{device}: {_unbuilt()}"
    elif lacking:
        yield f"{device}: PyTorch runs {', '.join(lacking)}: {' '.join(dict.fromkeys(lacking.values()))}"
    elif not (refused or slow):
        by = f"natively, by {library.path('cpu')}" if device.type == "cpu" else "by kernels"
        yield f"{device}: everything runs {by}."


def _unbuilt() -> str:
    """Why there is no native library for the CPU, and what to do."""
    reason = library.status()["cpu"]
    if reason != library.NOT_BUILT:
        return f"nothing runs natively: {reason}"
    state = "not built for this version and CPU, only for others" if library.has_others("cpu") else "not built"
    obstacle = build.objection()
    if obstacle is not None:
        return f"{state}, and cannot be: {obstacle}"
    # Twice: the ablation in bench/results, on an EPYC (Zen 4).
    return f"{state}: run `python -m erniem_fast build` (about {build.SECONDS} s; one text then runs twice as fast)."
