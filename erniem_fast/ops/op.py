"""An op declared once: two annotated functions give its custom ops, their fakes and its autograd."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import get_type_hints

import torch
from torch import Tensor

from .. import flags, modes
from ..verification.equivalence import check, draw
from .arguments import by_name, declared, flatten, restore, schema_of
from .choose import IMPLEMENTATIONS, Implementation, Tensors, arguments_of


class Op:
    """An op with several implementations, which autograd, torch.compile and torch.export know.

    Two functions declare it. They only return empty results, and so also serve as the fakes of the two custom ops
    `erniem_fast::<name>` and `erniem_fast::<name>_backward`:

    * `forward` returns the result, or a NamedTuple of the result and of the tensors that the backward needs.
    * `backward` takes `grad`, the gradient of the result, and any of the forward's arguments and results, by name;
      autograd saves exactly these. If a tensor is annotated as `torch.Size`, only its shape is saved; if it is
      annotated as `torch.Size | None`, it is None when no gradient of that tensor is needed. If a NamedTuple is
      annotated as one with fewer fields, only these are saved. `backward` returns a NamedTuple of gradients, each under
      the name of its argument.

    Arguments may be NamedTuples of tensors and numbers. Implementations receive them as such. They are flattened only
    for the custom ops, where field `seed` of argument `dropout` is called `dropout_seed`.

    An implementation's functions are called with keyword arguments: the op's arguments and `save`, which says whether
    the tensors for the backward are needed, as far as the function has parameters for them. They return the op's
    results as a tuple, or only the first.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Tensors],
        backward: Callable[..., tuple[Tensor, ...]],
        implementations: dict[str, Implementation],
        finish: Callable[..., tuple[Tensor | None, ...]] | None = None,
    ) -> None:
        """
        Args:
            name: a key of `flags.OPS`.
            forward, backward: the declaration.
            implementations: by name, the preferred first.
            finish: takes `grads`, the gradients that `backward` returns, and any of the saved values, by name, and
                returns the gradients for autograd: custom ops can return neither sparse tensors nor one tensor twice.
        """
        self.name = name
        self._implementations = IMPLEMENTATIONS[name]
        self._implementations.update(implementations)
        self._forward, self._backward, self._finish = forward, backward, finish
        self._arguments = declared(forward)
        self._saved = [each for each in declared(backward) if each.name != "grad"]
        self._results = getattr(get_type_hints(forward)["return"], "_fields", ("out",))
        self._gradients = get_type_hints(backward)["return"]
        self._plan_autograd()
        self._forward_op, self._backward_op = self._register_forward(), self._register_backward()
        self._eager = self._make_eager()

    def _plan_autograd(self) -> None:
        """Finds out once where among the custom op's inputs and results the values to save and the gradients belong."""
        inputs = [leaf.name for each in self._arguments for leaf in each.leaves()]
        saved = [leaf for each in self._saved for leaf in each.leaves()]
        sources, gradients = [*inputs, *self._results], self._gradients._fields
        unknown = {*(leaf.name for leaf in saved), *gradients} - {*sources}
        if unknown:  # a gradient of that name would be lost
            raise TypeError(
                f"{self.name}'s backward names {sorted(unknown)}, which its forward neither takes nor returns."
            )
        self._places = [sources.index(leaf.name) for leaf in saved]
        self._shapes = [index for index, leaf in enumerate(saved) if leaf.kind is torch.Size]
        self._wanted_shapes = [index for index in self._shapes if saved[index].optional]
        self._gradient_places = [gradients.index(each) if each in gradients else None for each in inputs]

    def __call__(self, implementation: str, *inputs: object, overwrite: bool = False) -> Tensor:
        """The op's result.

        A custom op computes it if anything but autograd follows the call, as a graph or a dispatch mode; otherwise the
        implementation is called directly, which takes the host a quarter of the time. Transforms of torch.func get the
        reference, which has PyTorch's own operators only.

        Args:
            implementation: its name, as `choose` returns it.
            inputs: the declared arguments, in order.
            overwrite: whether the result may take the memory of the argument that `forward_in_place` overwrites.

        Raises:
            RuntimeError: with `ERNIEM_FAST_VERIFY=1`, a result differs from the reference's.
        """
        save = torch.is_grad_enabled() and any(_requires_grad(each) for each in inputs)
        if modes.is_transformed():
            return self._run("reference", "forward", self._named(map(_plain, inputs), save))[0]
        flat = flatten(self._arguments, inputs)
        if modes.is_followed(flat):
            return _as_tuple(self._forward_op(*flat, save, implementation))[0]
        if save:
            return self._eager.apply(*flat, save, implementation)
        # Verification runs the reference on the same inputs, so do not overwrite them.
        overwrite = overwrite and self._implementations[implementation].forward_in_place is not None
        direction = "forward_in_place" if overwrite and flags.read(flags.VERIFY) == "0" else "forward"
        return self._run(implementation, direction, self._named(map(_plain, inputs), save))[0]

    def _named(self, inputs: Iterable[object], save: bool) -> dict[str, object]:
        return {**by_name(self._arguments, inputs), "save": save}

    def _run_forward(self, *flat: object) -> tuple[Tensor, ...]:
        """The forward of a custom op's inputs."""
        *flat, save, implementation = map(_plain, flat)
        return self._run(implementation, "forward", self._named(restore(self._arguments, flat), save))

    def _run_backward(self, *flat: object) -> tuple[Tensor, ...]:
        """The backward of a custom op's inputs."""
        grad, *flat, implementation = map(_plain, flat)
        values = by_name(self._saved, restore(self._saved, flat))
        return self._run(implementation, "backward", {"grad": grad, **values})

    # --- The custom ops ---

    def _register_forward(self) -> torch.library.CustomOpDef:
        def run(*flat):
            return _unpacked(self._run_forward(*flat))

        def fake(*flat):
            *flat, save, implementation = flat
            results = _as_tuple(self._forward(*restore(self._arguments, flat)))
            return _unpacked(self._complete(results, save and self._implementations[implementation].saves))

        schema = schema_of(self._arguments, "bool save", "str implementation", returns=len(self._results))
        op = torch.library.custom_op(f"erniem_fast::{self.name}", run, mutates_args=(), schema=schema)
        op.register_fake(fake)
        op.register_autograd(self._differentiate, setup_context=self._keep)
        return op

    def _register_backward(self) -> torch.library.CustomOpDef:
        def run(*flat):
            return _unpacked(self._run_backward(*flat))

        def fake(grad, *flat):
            return _unpacked(self._backward(grad, *restore(self._saved, flat[:-1])))

        schema = schema_of(self._saved, "str implementation", returns=len(self._gradients._fields), first="Tensor grad")
        op = torch.library.custom_op(f"erniem_fast::{self.name}_backward", run, mutates_args=(), schema=schema)
        op.register_fake(fake)
        op.register_autograd(_refuse_second_derivatives(self.name))
        return op

    def _make_eager(self) -> type[torch.autograd.Function]:
        """The function for autograd alone, without the dispatcher; profilers show it by the op's name."""

        def forward(ctx, *flat):
            outputs = self._run_forward(*flat)
            self._keep(ctx, flat, outputs)
            return outputs[0]

        methods = {"forward": staticmethod(forward), "backward": staticmethod(self._differentiate)}
        return type(self.name, (torch.autograd.Function,), methods)

    # --- Autograd ---

    def _keep(self, ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensors) -> None:
        """Saves the values that the backward takes."""
        ctx.set_materialize_grads(False)  # only the result has a gradient; the others need no zeros
        *inputs, _, ctx.implementation = inputs
        sources = (*inputs, *_as_tuple(output))
        saved = [sources[place] for place in self._places]
        for index in self._shapes:
            saved[index] = list(saved[index].shape)  # what a custom op makes of a shape
        ctx.save_for_backward(*(each for each in saved if isinstance(each, Tensor)))
        ctx.rest = [None if isinstance(each, Tensor) else (each,) for each in saved]

    def _differentiate(self, ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: None) -> tuple:
        """The gradients of the custom op's inputs, in their order."""
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if each is None else each[0] for each in ctx.rest]
        for index in self._wanted_shapes:
            if not ctx.needs_input_grad[self._places[index]]:
                saved[index] = None
        # A second derivative is asked for where gradients are enabled: the custom op refuses it by name.
        followed = torch.is_grad_enabled() or modes.is_followed((grad, *saved))
        backward = self._backward_op if followed else self._run_backward
        grads = self._gradients(*_as_tuple(backward(grad, *saved, ctx.implementation)))
        if self._finish is not None:
            values = {"grads": grads, **by_name(self._saved, restore(self._saved, saved))}
            grads = self._finish(**arguments_of(self._finish, values))
        needed = zip(self._gradient_places, ctx.needs_input_grad, strict=False)
        input_grads = (grads[place] if is_needed and place is not None else None for place, is_needed in needed)
        return *input_grads, None, None  # none for `save` and `implementation`

    # --- Implementations ---

    def _run(self, name: str, direction: str, values: dict[str, object]) -> tuple[Tensor, ...]:
        """Runs one direction of an implementation, and verifies it if the flag says so.

        Results are made contiguous. Autocast is off, because it is meant for matrix products only: implementations
        receive the dtypes that callers pass.
        """
        with _without_autocast(values):
            outputs = self._outputs(name, direction, values)
            if name != "reference" and flags.read(flags.VERIFY) == "1":
                self._verify(name, direction, values, outputs)
        return tuple(each.contiguous() for each in outputs)

    def _outputs(self, name: str, direction: str, values: dict[str, object]) -> tuple[Tensor, ...]:
        implementation = self._implementations[name]
        function = getattr(implementation, direction)
        outputs = _as_tuple(function(**arguments_of(function, values)))
        return outputs if direction == "backward" else self._complete(outputs, values["save"] and implementation.saves)

    def _complete(self, outputs: tuple[Tensor, ...], saves: bool) -> tuple[Tensor, ...]:
        """The forward's results; unless `saves`, those for the backward are empty tensors."""
        if saves:
            return outputs
        return outputs[0], *(outputs[0].new_empty(0) for _ in self._results[1:])

    def _verify(self, name: str, direction: str, values: dict[str, object], outputs: tuple[Tensor, ...]) -> None:
        def oracle(*inputs):
            return self._outputs("reference", direction, dict(zip(values, inputs, strict=True)))

        draws = draw(oracle, list(values.values()))
        check(f"{self.name} {direction} ({name})", outputs, draws)


_AS_IT_IS = nullcontext()


def _without_autocast(values: dict[str, object]) -> AbstractContextManager[object]:
    device = next(each for each in values.values() if isinstance(each, Tensor)).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def _plain(value: object) -> object:
    """The value as implementations receive it: tensors are contiguous and no lazy negations."""
    if isinstance(value, Tensor):
        return value.contiguous().resolve_neg()
    return type(value)(*map(_plain, value)) if isinstance(value, tuple) else value


def _requires_grad(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, tuple) and any(map(_requires_grad, value))


def _as_tuple(outputs: Tensors) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _unpacked(outputs: tuple[Tensor, ...]) -> Tensors:
    """The results as a custom op returns them: a single one without a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _refuse_second_derivatives(op: str) -> Callable[..., None]:
    def refuse(ctx, *grads):
        raise RuntimeError(
            f"erniem_fast::{op}_backward cannot be differentiated: backward(create_graph=True) gives no second "
            f"derivatives; use torch.func.grad of a function that calls torch.func.grad, which gives them."
        )

    return refuse
