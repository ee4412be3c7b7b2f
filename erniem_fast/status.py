"""What runs here, and why: the text of `python -m erniem_fast status`."""

import platform

import torch
import transformers

from . import flags, ops
from .inference import BFloat16Linear, linear_kind
from .inference_gpu import GPU_LINEARS, gpu_objection
from .matmul import fastest, may_choose
from .native import packed
from .ops.choose import choose
from .optimize import bfloat16_objection


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
