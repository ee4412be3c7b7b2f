"""The checkpoint in the formats of other runtimes. Each is made once in a run and shared by the workers that read it.

    python -m bench.peers.exports FORMAT MODEL TARGET

What is exported is XLM-RoBERTa with the same weights, which these tools know best. Of the ways to do it the fastest
for the rival was taken. Seconds for a batch of 32 at 54 % (base size, two cores with AVX-512): ONNX Runtime takes 1.69
for the traced graph as it is and 1.75 after its own optimizer for BERT, which fuses all attentions; OpenVINO takes 1.51
for what it converts from PyTorch, with an op for attention, and 1.57 for that ONNX graph.
A format whose scales are calibrated takes batches from the file CALIBRATION beside it.
"""

import json
import pathlib
import subprocess
import sys
import types

CALIBRATION = "calibration.json"


def exported(file_format, model, exports):
    """The folder that holds the checkpoint `model` in one of FORMATS below; it is made in `exports` if it isn't there.

    That happens in a process of its own, so that a worker's memory holds nothing of it.
    """
    target = pathlib.Path(exports, file_format)
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        if subprocess.run([sys.executable, "-m", "bench.peers.exports", file_format, model, unfinished]).returncode:
            sys.exit(f"the checkpoint could not be exported as {file_format}")
        unfinished.rename(target)
    return target


def onnx(model, target):
    import torch

    class ByPosition(torch.nn.Module):
        """The tracer hands inputs over by position."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, input_ids, attention_mask):
            return self.module(input_ids, attention_mask, return_dict=False)

    module, inputs = _xlm_roberta(model, attention="eager")  # that of SDPA is traced into many small nodes
    outputs = ["last_hidden_state", "pooler_output"]
    axes = {0: "batch", 1: "length"}
    torch.onnx.export(
        ByPosition(module),
        tuple(inputs.values()),
        str(target / "model.onnx"),
        input_names=[*inputs],
        output_names=outputs,
        dynamic_axes={**dict.fromkeys((*inputs, outputs[0]), axes), outputs[1]: {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )


def onnx_int8(model, target):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = exported("onnx", model, target.parent)
    # Without a type to fall back on it asks for all shapes to be inferred first, to the same end.
    quantize_dynamic(
        source / "model.onnx",
        target / "model.onnx",
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def openvino(model, target):
    import openvino

    module, inputs = _xlm_roberta(model, attention="sdpa")
    _save_openvino(openvino.convert_model(module, example_input=inputs), target)


def openvino_int8(model, target):
    """Weights by row; the inputs of products while it runs, in groups of features."""
    import nncf

    _save_openvino(nncf.compress_weights(_read_openvino(model, target)), target)


def openvino_static_int8(model, target):
    """Weights by row; the inputs of products with scales that are calibrated here."""
    import nncf
    import numpy as np

    batches = json.loads(pathlib.Path(target.parent, CALIBRATION).read_text())
    inputs = [{name: np.array(rows) for name, rows in batch.items()} for batch in batches]
    rounded = nncf.quantize(
        _read_openvino(model, target),
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
    )
    _save_openvino(rounded, target)


def _read_openvino(model, target):
    import openvino

    return openvino.Core().read_model(exported("openvino", model, target.parent) / "model.xml")


def _save_openvino(converted, target):
    import openvino

    openvino.save_model(converted, target / "model.xml", compress_to_fp16=False)


def ctranslate2(model, target):
    import torch
    from ctranslate2.converters import Converter
    from ctranslate2.converters.transformers import XLMRobertaLoader

    module, _ = _xlm_roberta(model, attention="sdpa")
    module.config.position_embedding_type = "absolute"  # of which the loader makes sure; transformers 5 knows no other
    words = [str(id) for id in range(module.config.vocab_size)]  # it wants to know them, and reads ids all the same

    class FromModule(Converter):
        @torch.no_grad()
        def _load(self):
            loader = XLMRobertaLoader()
            classifier = types.SimpleNamespace(config=module.config, roberta=module)
            spec = loader.get_model_spec(classifier)
            loader.set_config(spec.config, classifier, types.SimpleNamespace(unk_token=words[3]))
            spec.register_vocabulary(words)
            return spec

    FromModule().convert(target, force=True)


FORMATS = {
    "onnx": onnx,
    "onnx-int8": onnx_int8,
    "openvino": openvino,
    "openvino-int8": openvino_int8,
    "openvino-static-int8": openvino_static_int8,
    "ctranslate2": ctranslate2,
}


def _xlm_roberta(model, attention):
    """The module, ready to be traced, and inputs to trace it with: a batch with padding."""
    import torch

    from bench.peers import xlm_roberta

    ids = torch.tensor([[4, 5, 6], [7, xlm_roberta.PAD, xlm_roberta.PAD]])
    inputs = {"input_ids": ids, "attention_mask": (ids != xlm_roberta.PAD).long()}
    return xlm_roberta.load(model, torch.float32, attention).eval(), inputs


if __name__ == "__main__":
    name, model, target = sys.argv[1:]
    FORMATS[name](model, pathlib.Path(target))
