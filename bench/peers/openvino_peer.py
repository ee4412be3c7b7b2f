"""Worker: OpenVINO on XLM-RoBERTa with the same weights."""

import numpy as np
import openvino

from bench.peers.exports import exported
from bench.peers.serve import Peer, only_float32_on_cpu, serve


class OpenVino(Peer):
    def export(self, model, exports):
        self.path = exported("openvino", model, exports) / "model.xml"

    def load(self, model, device, dtype, threads):
        only_float32_on_cpu(device, dtype)
        # Where a CPU has bfloat16 matrix units, OpenVINO would use them unasked.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.request = openvino.Core().compile_model(self.path, "CPU", options).create_infer_request()
        return {"openvino": openvino.__version__}

    def prepare(self, input_ids, attention_mask):
        return {"input_ids": np.array(input_ids), "attention_mask": np.array(attention_mask)}

    def forward(self, inputs):
        return self.request.infer(inputs)["last_hidden_state"]


if __name__ == "__main__":
    serve(OpenVino())
