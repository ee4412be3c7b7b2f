"""Worker: erniem_fast.ErnieMModel, called as any user calls it.

With the argument "int8" it is rounded as in the README, with "graphs" it replays CUDA graphs.
"""

import sys
import warnings

import torch
import transformers

import erniem_fast
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


class ErnieMFast(TorchPeer):
    def build(self, model, dtype):
        module = erniem_fast.ErnieMModel.from_pretrained(model, dtype=dtype)
        if "int8" in sys.argv[1:]:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

            warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
            torch.backends.quantized.engine = "onednn"
            module.encoder = quantize_dynamic(module.encoder, {torch.nn.Linear: per_channel_dynamic_qconfig})
        return module, {"transformers": transformers.__version__}

    def load(self, model, device, dtype, threads):
        versions = super().load(model, device, dtype, threads)
        if "graphs" in sys.argv[1:]:
            erniem_fast.use_graphs(self.module)
        return versions


if __name__ == "__main__":
    serve(ErnieMFast())
