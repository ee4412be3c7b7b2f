"""The peers: erniem_fast, and all that could be used in its place."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import torch

from bench import ROOT
from bench.model.workers import Peer
from erniem_fast import flags, ops
from erniem_fast.ops.choose import choose

OURS_PYTHON = pathlib.Path(sys.executable)
# Two releases of transformers do not fit into one environment. What each holds is pinned in bench/peers.
TRANSFORMERS4 = ROOT / ".venv-peers/bin/python"
RIVALS = ROOT / ".venv-rivals/bin/python"


def _peer(name, python, module, *arguments, **options):
    return Peer(name, ("-m", f"bench.peers.{module}", *arguments), python, **options)


OURS = _peer("erniem_fast", OURS_PYTHON, "ours", trains=True)
OURS_GRAPHS = _peer(f"{OURS.name}, CUDA graphs", OURS_PYTHON, "ours", "graphs")
OPTIMIZED = {
    weights: _peer(f"{OURS.name} {weights}", OURS_PYTHON, "ours", weights, weights=weights)
    for weights in ("packed", "bfloat16", "int8", "float8")
}
OURS_NAMES = (OURS.name, *(peer.name for peer in OPTIMIZED.values()))
ORIGINAL = _peer("transformers 4.57.6", TRANSFORMERS4, "transformers4", trains=True)
# In the order in which they get memory, where there is not enough for all.
ALL = (
    OURS,
    ORIGINAL,
    _peer("XLM-R SDPA", RIVALS, "transformers5", "sdpa", trains=True),
    _peer("XLM-R, optimize", OURS_PYTHON, "transformers5", "sdpa", "optimize", trains=True),
    OPTIMIZED["packed"],
    _peer("CTranslate2", RIVALS, "ctranslate2_peer", "float32", weights="packed"),
    _peer("OpenVINO", RIVALS, "openvino_peer", "openvino", weights="packed"),
    _peer("ONNX Runtime", RIVALS, "onnxruntime_peer", "onnx", weights="packed"),
    _peer("zentorch", RIVALS, "zentorch_peer", weights="packed"),
    _peer("transformers 4, compiled", TRANSFORMERS4, "transformers4", "compile", trains=True),
    _peer("XLM-R eager", RIVALS, "transformers5", "eager", trains=True),
    OPTIMIZED["bfloat16"],
    _peer("OpenVINO bfloat16", RIVALS, "openvino_peer", "openvino", "bf16", weights="bfloat16"),
    _peer("zentorch bfloat16", RIVALS, "zentorch_peer", "bfloat16", weights="bfloat16"),
    OPTIMIZED["int8"],
    _peer("CTranslate2 int8", RIVALS, "ctranslate2_peer", "int8", weights="int8"),
    _peer("ONNX Runtime int8", RIVALS, "onnxruntime_peer", "onnx-int8", weights="int8"),
    _peer("OpenVINO int8", RIVALS, "openvino_peer", "openvino-int8", weights="int8"),
    _peer("OpenVINO static int8", RIVALS, "openvino_peer", "openvino-static-int8", weights="int8"),
    _peer("zentorch int8", RIVALS, "zentorch_peer", "int8", weights="int8"),
)
# On a GPU packed PyTorch takes the place of the CPU's runtimes. A machine with a GPU may have no network to install the
# rivals' environment from; these need no more than ours does.
ON_CUDA = tuple(
    peer if peer.python != RIVALS or RIVALS.exists() else dataclasses.replace(peer, python=OURS_PYTHON)
    for peer in (
        *(peer for peer in ALL if peer.trains),
        OURS_GRAPHS,
        OPTIMIZED["float8"],
        OPTIMIZED["int8"],
        _peer("packed, varlen_attn", RIVALS, "packed", "varlen"),
        _peer("packed, varlen_attn, compiled", RIVALS, "packed", "compile"),
        _peer("packed, flash-attn", RIVALS, "packed", "flash"),
    )
)


def rivals(against: str, device: str, dtype: str) -> tuple[Peer, ...]:
    """The peers of a run, ours first.

    Args:
        against: "original"; "all"; of these, on a CPU, those that are "unrounded" or "rounded"; or "itself":
            erniem_fast with its kernels and its packing switched off.
        device, dtype: names of what is measured; they decide which kernels there are to switch off.
    """
    if against == "itself":
        return OURS, *_ablations(torch.device(device), getattr(torch, dtype))
    on_cuda = torch.device(device).type == "cuda"
    if against == "original":
        return (OURS, OURS_GRAPHS, ORIGINAL) if on_cuda else (OURS, ORIGINAL)
    if on_cuda:
        return ON_CUDA
    return OURS, *(peer for peer in ALL[1:] if against == "all" or peer.is_rounded == (against == "rounded"))


def _ablations(device: torch.device, dtype: torch.dtype) -> Iterator[Peer]:
    """Erniem_fast without any kernel, without packing, without each kernel that runs here, and with it alone."""
    chosen = {op: choose(op, device, dtype) for op in ops.IMPLEMENTATIONS}
    kernels = {op: name for op, name in chosen.items() if name not in ("torch", "reference")}
    off, padded = {flags.KERNELS.name: "off"}, {flags.PACKING.name: "0"}
    yield _variant("no kernels", off)
    yield _variant("no packing", padded)
    yield _variant("no kernels, no packing", {**off, **padded})
    for op, name in kernels.items():
        yield _variant(f"{op} not by {name}", {flags.OPS[op].name: "torch"})
    for op, name in kernels.items() if len(kernels) > 1 else ():
        yield _variant(f"{op} by {name} alone", {**off, flags.OPS[op].name: name})


def _variant(name, environment):
    return dataclasses.replace(OURS, name=name, environment=environment)
