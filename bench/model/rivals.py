"""Who runs: erniem_fast, and all that could be used in its place."""

import pathlib
import sys

import torch

from bench import ROOT
from bench.model.workers import Peer
from erniem_fast import flags, ops
from erniem_fast.ops.implementation import choose

SCRIPTS = ROOT / "bench/peers"
# Two releases of transformers do not fit into one environment. What each holds is pinned in bench/peers.
TRANSFORMERS4 = ROOT / ".venv-peers/bin/python"
RIVALS = ROOT / ".venv-rivals/bin/python"

OURS = Peer("erniem_fast", SCRIPTS / "ours.py", pathlib.Path(sys.executable), trains=True)
OURS_INT8 = Peer(f"{OURS.name} int8", OURS.script, OURS.python, ("int8",), int8=True)
ORIGINAL = Peer("transformers 4.57.6", SCRIPTS / "transformers4.py", TRANSFORMERS4, trains=True)
# In the order in which they get memory, where there is not enough for all.
ALL = (
    OURS,
    ORIGINAL,
    Peer("XLM-R SDPA", SCRIPTS / "transformers5.py", RIVALS, ("sdpa",), trains=True),
    Peer("CTranslate2", SCRIPTS / "ctranslate2_peer.py", RIVALS, ("float32",)),
    Peer("OpenVINO", SCRIPTS / "openvino_peer.py", RIVALS),
    Peer("ONNX Runtime", SCRIPTS / "onnxruntime_peer.py", RIVALS, ("onnx",)),
    Peer("transformers 4, compiled", SCRIPTS / "transformers4.py", TRANSFORMERS4, ("compile",), trains=True),
    Peer("XLM-R eager", SCRIPTS / "transformers5.py", RIVALS, ("eager",), trains=True),
    OURS_INT8,
    Peer("CTranslate2 int8", SCRIPTS / "ctranslate2_peer.py", RIVALS, ("int8",), int8=True),
    Peer("ONNX Runtime int8", SCRIPTS / "onnxruntime_peer.py", RIVALS, ("onnx-int8",), int8=True),
)
# On a GPU packed PyTorch takes the place of the CPU's runtimes.
ON_CUDA = (
    *(peer for peer in ALL if peer.trains),
    Peer("packed, varlen_attn", SCRIPTS / "packed.py", RIVALS, ("varlen",)),
    Peer("packed, varlen_attn, compiled", SCRIPTS / "packed.py", RIVALS, ("compile",)),
    Peer("packed, flash-attn", SCRIPTS / "packed.py", RIVALS, ("flash",)),
)


def rivals(against, device, dtype):
    """The peers of a run, ours first.

    Args:
        against: "original", "all", or "itself": erniem_fast with its kernels and its packing switched off.
        device, dtype: names of what is measured; they decide which kernels there are to switch off.
    """
    if against == "itself":
        return OURS, *_ablations(torch.device(device), getattr(torch, dtype))
    if against == "original":
        return OURS, ORIGINAL
    return ON_CUDA if torch.device(device).type == "cuda" else ALL


def _ablations(device, dtype):
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
    return Peer(name, OURS.script, OURS.python, environment=environment, trains=True)
