"""Worker: ErnieMModel of transformers 4.57.6, the last release that had it; "compile" as an argument compiles it."""

import sys

import torch
import transformers

from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


def cast_mask(encoder, args, kwargs):
    """The original makes a float32 mask whatever the weights are, and crashes on bfloat16 and float16 ones."""
    kwargs["attention_mask"] = kwargs["attention_mask"].to(args[0].dtype)
    return args, kwargs


class Transformers4(TorchPeer):
    def build(self, model, dtype):
        module = transformers.ErnieMModel.from_pretrained(model, dtype=dtype)
        module.encoder.register_forward_pre_hook(cast_mask, with_kwargs=True)
        if "compile" in sys.argv:
            # With sizes left open it is compiled twice, for one row and for many, and not for every shape.
            module = torch.compile(module, dynamic=True)
        return module, {"transformers": transformers.__version__}


if __name__ == "__main__":
    serve(Transformers4())
