"""Worker: OpenVINO on XLM-RoBERTa with the same weights.

    python -m bench.peers.openvino_peer FORMAT [PRECISION]

FORMAT is "openvino", "openvino-int8" or "openvino-static-int8"; PRECISION, of all that is not rounded to 8 bits, "f32"
or "bf16". In 8 bits both take as long: 0.12 to 0.15 seconds for 32 rows of 32 tokens with 384 features (two cores of a
Zen 5), where bf16 alone takes 0.15 and f32 0.26.
"""

import sys

import numpy as np
import openvino

from bench.peers.exports import exported
from bench.peers.serve import Peer, only_float32_on_cpu, serve


class OpenVino(Peer):
    def __init__(self, file_format, precision="f32"):
        self.file_format, self.precision = file_format, precision

    def export(self, model, exports):
        self.path = exported(self.file_format, model, exports) / "model.xml"

    def load(self, model, device, dtype, threads):
        only_float32_on_cpu(device, dtype)
        core = openvino.Core()
        if self.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            sys.exit("this CPU has no instructions for bfloat16")
        # Where a CPU has bfloat16 matrix units, OpenVINO would use them unasked.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        self.request = core.compile_model(self.path, "CPU", options).create_infer_request()
        return {"openvino": openvino.__version__}

    def prepare(self, input_ids, attention_mask):
        return {"input_ids": np.array(input_ids), "attention_mask": np.array(attention_mask)}

    def forward(self, inputs):
        return self.request.infer(inputs)["last_hidden_state"]


if __name__ == "__main__":
    serve(OpenVino(*sys.argv[1:]))
