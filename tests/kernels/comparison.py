"""How a kernel is compared with the reference: rule 1 of the kernels, forward and every gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from erniem_fast.verification.equivalence import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor([0x123456789ABCDEF], device=DEVICE)


def run(op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The result of `op(*inputs)`, then the gradient of every input."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = op(*leaves)
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_equivalent(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Holds forward and every gradient to `compare`; results keep the dtypes of the kernel."""
    exact_inputs = [each.double() for each in inputs]
    with torch.no_grad():
        grad = torch.randn_like(reference(*exact_inputs))
    # The gradient of the result is rounded once, so that all three start from the same values.
    grad = grad.to(min((each.dtype for each in inputs), key=lambda dtype: dtype.itemsize))
    results = zip(
        run(kernel, inputs, grad), run(reference, inputs, grad), run(reference, exact_inputs, grad), strict=True
    )
    for index, (output, same, exact) in enumerate(results):
        assert output.shape == exact.shape
        assert not output.isnan().any()
        comparison = compare(output, (same, exact))
        assert comparison.holds, f"result {index} (0 is the output): {comparison}"
