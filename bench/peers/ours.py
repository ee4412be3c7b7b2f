"""Worker: erniem_fast.ErnieMModel, called as any user calls it.

The argument "packed", "bfloat16", "int8" or "float8" is the form that `erniem_fast.optimize` gives the weights; with
"graphs" the model replays CUDA graphs, of batches too.
"""

import sys

import torch.nn.functional as F
import transformers

import erniem_fast
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer
from erniem_fast.vocabulary_loss import vocabulary_losses

MOST_TOKENS = 16384  # of a graph, so that one serves batches of text too


class ErnieMFast(TorchPeer):
    def __init__(self, option=None):
        self.graphs = option == "graphs"
        self.weights = None if self.graphs else option

    def build(self, model, dtype):
        module = erniem_fast.ErnieMModel.from_pretrained(model, dtype=dtype).to(self.device)
        if self.weights:
            erniem_fast.optimize(module, weights=self.weights)
        return module, {"transformers": transformers.__version__}

    def _masked_loss(self, inputs):
        """As ErnieMForMaskedLM computes it: for the tokens that are predicted, a part of them at a time."""
        labels, head = self.labels(inputs), self._head
        hidden = self.module(**inputs).last_hidden_state[labels >= 0]
        transformed = head.layer_norm(F.gelu(head.dense(hidden)))
        labels = labels[labels >= 0]
        return vocabulary_losses(transformed, head.decoder.weight, head.decoder.bias, labels)[0] / len(labels)

    def load(self, model, device, dtype, threads):
        versions = super().load(model, device, dtype, threads)
        if self.graphs:
            erniem_fast.use_graphs(self.module, MOST_TOKENS)
        return versions


if __name__ == "__main__":
    serve(ErnieMFast(*sys.argv[1:]))
