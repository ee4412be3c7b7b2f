"""What bfloat16 costs the Triton kernels: little more than the rounding of their results.

The slack of the battery's bound, 8 units in the last place, hides a value that is rounded on the way though it need not
be. Over thousands of elements, the root of the mean of squares shows it.
"""

import torch

from erniem_fast.flags import use_implementations
from erniem_fast.verification import battery
from tests.kernels.comparison import DEVICE, run

# By op and case of the battery, which together take every kernel: the error of each result over the error that rounding
# the exact result makes, as measured. What exceeds 1 cannot be helped: attention rounds its probabilities and the
# gradient of its scores, because products take them, and the backward of a layer norm reads its input rounded, from
# which it makes the gradient of the weight.
ERRORS = {
    "attention": {
        # The backward in one pass over one block of keys, in one pass over two, and in two passes.
        "lengths around 64, 2 x 64, p 0.1": {"result": 1.28, "q": 1.46, "k": 1.44, "v": 1.43},
        "lengths around 64, 1 x 128, p 0.1": {"result": 1.24, "q": 1.51, "k": 1.48, "v": 1.42},
        "padded at the left, 1 x 128, p 0.3": {"result": 1.19, "q": 1.73, "k": 1.71, "v": 1.45},
    },
    "bias_gelu": {
        "packed with holes x 96, gelu, p 0.3": {"result": 1.0, "x": 1.0, "bias": 1.0},
    },
    "add_norm": {
        "lengths around 128 x 96, p 0.1": {
            "result": 1.0,
            "residual": 1.07,
            "x": 1.08,
            "weight": 1.93,
            "norm_bias": 1.0,
            "bias": 1.11,
        },
        "18 tokens x 768, p 0.0, no bias": {
            "result": 1.0,
            "residual": 1.02,
            "x": 1.02,
            "weight": 2.64,
            "norm_bias": 1.0,
        },
    },
}
MARGIN = 1.05


def errors(op, shape):
    """As in the table, by the root of the mean of squares; the gradient of qkv in its three parts."""
    (case,) = (case for case in battery._HARD if (case.op, case.shape) == (op, shape))
    generator = torch.Generator().manual_seed(0)
    call, leaves = case.make(generator, DEVICE, torch.bfloat16)
    inputs = list(leaves.values())
    with use_implementations(**{op: "reference"}):
        grad = torch.randn(call(*inputs).shape, generator=generator).to(DEVICE, torch.bfloat16)
        exact = run(call, [each.double() for each in inputs], grad)
    with use_implementations(**{op: "triton"}):
        results = run(call, inputs, grad)
    names = ["result", *leaves]
    if op == "attention":
        names = ["result", *"qkv"]
        results, exact = ([out, *grad_qkv.chunk(3, dim=1)] for out, grad_qkv in (results, exact))
    return {
        name: ((result - truth).norm() / (truth.bfloat16() - truth).norm()).item()
        for name, result, truth in zip(names, results, exact, strict=True)
    }


def rounds_little(op, shape):
    return all(error <= MARGIN * ERRORS[op][shape][name] for name, error in errors(op, shape).items())
