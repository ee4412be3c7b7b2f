"""Worker: ONNX Runtime on XLM-RoBERTa with the same weights; the argument says "onnx" or "onnx-int8"."""

import sys

import numpy as np
import onnxruntime

from bench.peers.exports import exported
from bench.peers.serve import Peer, only_float32_on_cpu, serve


class OnnxRuntime(Peer):
    def __init__(self, file_format):
        self.file_format = file_format

    def export(self, model, exports):
        self.path = exported(self.file_format, model, exports) / "model.onnx"

    def load(self, model, device, dtype, threads):
        only_float32_on_cpu(device, dtype)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return {"onnxruntime": onnxruntime.__version__}

    def prepare(self, input_ids, attention_mask):
        return {"input_ids": np.array(input_ids), "attention_mask": np.array(attention_mask)}

    def forward(self, inputs):
        return self.session.run(["last_hidden_state", "pooler_output"], inputs)[0]


if __name__ == "__main__":
    serve(OnnxRuntime(sys.argv[1]))
