"""Worker: erniem_fast.ErnieMModel, called as any user calls it; an argument names the form of its weights.

The forms are those of `erniem_fast.optimize`: "packed", "bfloat16" and "int8".
"""

import sys

import transformers

import erniem_fast
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


class ErnieMFast(TorchPeer):
    def build(self, model, dtype):
        module = erniem_fast.ErnieMModel.from_pretrained(model, dtype=dtype)
        return erniem_fast.optimize(module, *sys.argv[1:]), {"transformers": transformers.__version__}


if __name__ == "__main__":
    serve(ErnieMFast())
