"""Worker: XLM-RoBERTa compiled by zentorch, AMD's plug-in for PyTorch, with the same weights.

The argument "bfloat16" is the precision of the whole model; with "int8" weights are rounded by row and the inputs of
linears by token, as zentorch's own product does it.
"""

import importlib.metadata
import pathlib
import sys

import torch
import zentorch  # noqa: F401 (registers the compiler and the ops)
from torch import nn

from bench.peers import xlm_roberta
from bench.peers.serve import only_float32_on_cpu, serve
from bench.peers.torch_peer import TorchPeer

CPUINFO = pathlib.Path("/proc/cpuinfo")
# The weights are packed once, and not at every call.
torch._inductor.config.freezing = True


class Int8Linear(nn.Module):
    """The weight stays as it is: packed for zentorch, one of 3,072 features or more gives wrong results (2.13.0.2)."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = (linear.weight / scales.clamp(min=torch.finfo(scales.dtype).tiny)).round().to(torch.int8)
        self.scales, self.bias = scales.flatten(), linear.bias

    def forward(self, x):
        return torch.ops.zentorch.zentorch_dynamic_qlinear(x, self.weight, self.scales, self.bias)


class Zentorch(TorchPeer):
    def __init__(self, weights=None):
        self.weights = weights

    def load(self, model, device, dtype, threads):
        only_float32_on_cpu(device, dtype)
        if "AuthenticAMD" not in (CPUINFO.read_text() if CPUINFO.exists() else ""):
            sys.exit("it is made for AMD's CPUs")
        return super().load(model, device, self.weights if self.weights == "bfloat16" else dtype, threads)

    @torch.no_grad()
    def build(self, model, dtype):
        module = xlm_roberta.load(model, dtype, "sdpa").requires_grad_(False)
        if self.weights == "int8":
            linears = [(name, each) for name, each in module.encoder.named_modules() if isinstance(each, nn.Linear)]
            for name, linear in linears:
                module.encoder.set_submodule(name, Int8Linear(linear))
        # zentorch's compiler would pack the weights of Int8Linear.
        backend = "inductor" if self.weights == "int8" else "zentorch"
        versions = {"zentorch": importlib.metadata.version("zentorch")}
        return torch.compile(module, backend=backend, dynamic=True), versions


if __name__ == "__main__":
    serve(Zentorch(*sys.argv[1:]))
