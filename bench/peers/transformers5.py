"""Worker: XLMRobertaModel of transformers 5 with the same weights.

    python -m bench.peers.transformers5 ATTENTION [optimize]

ATTENTION is "eager" or "sdpa"; with "optimize" `erniem_fast.optimize` takes the model.
"""

import sys

import transformers

from bench.peers import xlm_roberta
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


class Transformers5(TorchPeer):
    def __init__(self, attention, option=None):
        self.attention, self.is_optimized = attention, option == "optimize"

    def build(self, model, dtype):
        module = xlm_roberta.load(model, dtype, self.attention)
        if self.is_optimized:
            import erniem_fast  # the rivals' environment has none

            erniem_fast.optimize(module)
        return module, {"transformers": transformers.__version__}


if __name__ == "__main__":
    serve(Transformers5(*sys.argv[1:]))
