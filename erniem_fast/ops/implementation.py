"""What an op's implementations have in common: how one is chosen, and how it is verified against the reference."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .. import flags, modes
from ..equivalence import Draw, compare, draw

Tensors = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        forward, backward: take and return what the op's two custom ops do, without the implementation's name.
        refuses: why it cannot serve a device and dtype, with the remedy; None where it can.
        prepare: makes it ready to serve a device, for callers that ask for it by name.
        forward_in_place: a forward whose result takes the memory of an argument; None where there is none.
        fuses_bias: whether the bias of the matrix product before it is cheaper here than in the product.
        automatic: whether `auto` takes it on a device that it can serve.
        largest: the largest size that it can serve, see `choose`.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    refuses: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    prepare: Callable[[torch.device], None] = lambda device: None
    forward_in_place: Callable[..., Tensors] | None = None
    fuses_bias: bool = False
    automatic: Callable[[torch.device], bool] = lambda device: True
    largest: float = inf

    def objection(self, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
        """Why it cannot serve a call, with the remedy; None where it can."""
        if size > self.largest:
            return f"it is built for sizes up to {self.largest}, not {size}; choose `torch`."
        return self.refuses(device, dtype)


# The implementations of each op, by the names of `flags.OPS` and their own, the preferred first; every op's file adds
# its own.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


@torch.compiler.assume_constant_result  # torch.compile takes the choice as a constant of its graph
@flags.while_held
def choose(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str:
    """The implementation that runs a call: the flag's, or with `auto` the first that can serve it.

    Args:
        op: a key of `flags.OPS`.
        device, dtype: of the op's input.
        size: head_dim for attention; nothing to the other ops.

    Raises:
        RuntimeError: the flag asks for an implementation that cannot serve this device, dtype and size.
    """
    implementations = IMPLEMENTATIONS[op]
    wanted = flags.read(flags.OPS[op])
    if wanted != "auto":
        implementations[wanted].prepare(device)
        reason = implementations[wanted].objection(device, dtype, size)
        if reason is not None:
            raise RuntimeError(f"{flags.OPS[op].name}={wanted} cannot be served: {reason}")
        return wanted
    if flags.read(flags.KERNELS) == "off":
        return "torch"
    served = (each for each in implementations.items() if each[1].automatic(device))
    return next(name for name, each in served if each.objection(device, dtype, size) is None)


def differentiable(*inputs: Tensor | None) -> bool:
    """Whether autograd follows a call with these inputs."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)


def once_differentiable(backward: torch.library.CustomOpDef) -> None:
    """Makes the second of two backwards through a backward's custom op an error that says what to do."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{backward._qualname} cannot be differentiated: backward(create_graph=True) gives no second derivatives; "
            f"torch.func gives them, as torch.func.grad of a function that takes a torch.func.grad."
        )

    backward.register_autograd(refuse)


def call(
    op: str,
    name: str,
    custom_op: Callable[..., Tensors],
    differentiable: bool,
    *inputs: object,
    overwrite: bool = False,
) -> Tensors:
    """Runs a forward: as a custom op where autograd, a graph or a tensor without values needs it, else directly.

    Transforms get the reference, whose operators are all PyTorch's.
    `overwrite` lets the result take the memory of the input that the op says nobody needs afterwards.
    """
    if modes.is_transformed():
        return run(op, "reference", "forward", *inputs)
    if differentiable or modes.is_recorded() or type(inputs[0]) is not Tensor or inputs[0].is_meta:
        return custom_op(*inputs, name)
    # The reference beside it would find its input gone.
    overwrite = overwrite and IMPLEMENTATIONS[op][name].forward_in_place is not None and flags.read(flags.VERIFY) == "0"
    return run(op, name, "forward_in_place" if overwrite else "forward", *inputs)


def run(op: str, name: str, direction: str, *inputs: object) -> Tensors:
    """Runs one direction (`forward` or `backward`) of an implementation, verified where the flag asks for it.

    Implementations get and give contiguous tensors, none of them a lazy negation, and the dtypes that come: autocast is
    the products' concern.
    """
    inputs = [each.contiguous().resolve_neg() if isinstance(each, Tensor) else each for each in inputs]
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _run(op, name, direction, inputs)
    return _run(op, name, direction, inputs)


def _run(op: str, name: str, direction: str, inputs: list[object]) -> Tensors:
    implementations = IMPLEMENTATIONS[op]
    outputs = getattr(implementations[name], direction)(*inputs)
    if name != "reference" and flags.read(flags.VERIFY) == "1":
        oracle = getattr(implementations["reference"], direction)
        draws = draw(lambda *values: _as_tuple(oracle(*values)), inputs)
        _verify(f"{op} {direction} ({name})", _as_tuple(outputs), draws)
    return outputs.contiguous() if isinstance(outputs, Tensor) else tuple(each.contiguous() for each in outputs)


_REMEDY = "Choose another implementation by its flag and report this with the output of `python -m erniem_fast status`."


def _verify(call: str, outputs: tuple[Tensor, ...], draws: list[Draw]) -> None:
    """Raises where a result is not equivalent to the reference's."""
    for index, output in enumerate(outputs):
        of_output = [(same[index], exact[index]) for same, exact in draws]
        same, _ = of_output[0]
        if same.numel() == 0:
            continue  # what the reference does not save, an implementation may
        if output.shape != same.shape or output.dtype != same.dtype:
            raise RuntimeError(
                f"{call} disagrees with the reference: result {index} has shape {tuple(output.shape)} and dtype "
                f"{output.dtype}, not {tuple(same.shape)} and {same.dtype}. {_REMEDY}"
            )
        comparison = compare(output, *of_output)
        if not comparison.holds:
            raise RuntimeError(
                f"{call} disagrees with the reference: result {index} of shape {tuple(output.shape)} and dtype "
                f"{output.dtype} is off by {comparison.error:.3e}, the bound is {comparison.bound:.3e}. {_REMEDY}"
            )


def _as_tuple(outputs: Tensors) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
