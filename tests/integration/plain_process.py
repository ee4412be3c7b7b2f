"""Runs graphs where erniem_fast is not: `python -I plain_process.py FOLDER`.

FOLDER/inputs.pt holds, by the name of a graph's file in FOLDER, a list of inputs, each a dict of tensors. What the
graph makes of each, a list of tensors, goes to FOLDER/outputs.pt, by the file's name and the runtime's.
"""

import pathlib
import sys

import torch


def in_torchscript(path):
    graph = torch.jit.load(path)
    return lambda inputs: graph(**inputs)


def in_torch(path):
    graph = torch.export.load(path).module()
    return lambda inputs: graph(**inputs)


def in_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})


def in_openvino(path):
    import openvino

    # Otherwise it multiplies in bfloat16 where the processor does.
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: compiled({name: value.numpy() for name, value in inputs.items()}).to_tuple()


RUNTIMES = {
    ".pt": {"torchscript": in_torchscript},
    ".pt2": {"torch": in_torch},
    ".onnx": {"onnxruntime": in_onnxruntime, "openvino": in_openvino},
    ".xml": {"openvino": in_openvino},
}


def main(folder):
    results = {}
    for name, batches in torch.load(folder / "inputs.pt").items():
        for runtime, load in RUNTIMES[pathlib.Path(name).suffix].items():
            run = load(str(folder / name))
            with torch.no_grad():
                results[name, runtime] = [[torch.as_tensor(each) for each in run(batch)] for batch in batches]
    assert "erniem_fast" not in sys.modules
    torch.save(results, folder / "outputs.pt")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
