"""Worker: erniem_fast.ErnieMModel, called as any user calls it.

An argument names the form of its weights, "packed", "bfloat16" or "int8" (see `erniem_fast.optimize`), or is "graphs":
then it replays CUDA graphs.
"""

import sys

import transformers

import erniem_fast
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


class ErnieMFast(TorchPeer):
    def build(self, model, dtype):
        module = erniem_fast.ErnieMModel.from_pretrained(model, dtype=dtype)
        forms = [each for each in sys.argv[1:] if each != "graphs"]
        return erniem_fast.optimize(module, *forms), {"transformers": transformers.__version__}

    def load(self, model, device, dtype, threads):
        versions = super().load(model, device, dtype, threads)
        if "graphs" in sys.argv[1:]:
            erniem_fast.use_graphs(self.module)
        return versions


if __name__ == "__main__":
    serve(ErnieMFast())
