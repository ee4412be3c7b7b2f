"""Worker: XLMRobertaModel of transformers 5 with the same weights; the argument is its attention, "eager" or "sdpa"."""

import sys

import transformers

from bench.peers import xlm_roberta
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


class Transformers5(TorchPeer):
    def __init__(self, attention):
        self.attention = attention

    def build(self, model, dtype):
        return xlm_roberta.load(model, dtype, self.attention), {"transformers": transformers.__version__}


if __name__ == "__main__":
    serve(Transformers5(sys.argv[1]))
