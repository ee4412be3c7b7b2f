"""Worker: CTranslate2 on XLM-RoBERTa with the same weights; the argument is its compute type, "float32" or "int8".

It leaves padding out of its matrix products, as erniem_fast does.
"""

import sys

import ctranslate2
import numpy as np

from bench.peers.exports import exported
from bench.peers.serve import Peer, only_float32_on_cpu, serve


class CTranslate2(Peer):
    def __init__(self, compute_type):
        self.compute_type = compute_type

    def export(self, model, exports):
        self.path = exported("ctranslate2", model, exports)

    def load(self, model, device, dtype, threads):
        only_float32_on_cpu(device, dtype)
        self.encoder = ctranslate2.Encoder(
            str(self.path), compute_type=self.compute_type, inter_threads=1, intra_threads=threads
        )
        return {"ctranslate2": ctranslate2.__version__}

    def prepare(self, input_ids, attention_mask):
        return np.array(input_ids, dtype=np.int32), np.sum(attention_mask, axis=1, dtype=np.int32)

    def forward(self, inputs):
        ids, lengths = map(ctranslate2.StorageView.from_array, inputs)
        return self.encoder.forward_batch(ids, lengths).last_hidden_state


if __name__ == "__main__":
    serve(CTranslate2(sys.argv[1]))
