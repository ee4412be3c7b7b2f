"""What observes a forward: recording of graphs, transforms, autocast, and hooks on modules.

This is the only module that uses torch's private API; so it also holds the calls of oneDNN's linear and of the products
of 8-bit numbers, asks what the CPU can do, and hides a worker of a DataLoader.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data._utils import worker as data_worker
from torch.utils.hooks import RemovableHandle


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD transforms what is computed now: they know only PyTorch's own operators."""
    if torch.compiler.is_compiling():
        return False
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_mapped(value: Tensor) -> bool:
    """Whether torch.vmap maps over a tensor, even one that another transform has wrapped."""
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds values: fake tensors and those on the meta device have only a shape and a dtype."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_recorded() -> bool:
    """Whether a graph is being recorded, to run here (torch.compile) or elsewhere: the host cannot read values then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether a graph is being recorded to run elsewhere, by torch.jit.trace, torch.export or torch.onnx.export.

    Such a graph must run without this library, for any sizes and masks. So it may contain only PyTorch's own operators,
    and nothing that was read from the example's values.
    """
    # `torch.compiler.is_exporting()` reads the same flag, but is True in graphs of torch.compile before torch 2.13.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def may_write(x: Tensor) -> bool:
    """Whether a product of `x` may be written into existing memory: not where autograd or anything else follows it."""
    return not torch.is_grad_enabled() and is_plain_call(x)


def is_plain_call(x: Tensor) -> bool:
    """Whether a product of `x` need not be made of PyTorch's operators: nothing but autograd follows it."""
    return not (is_followed((x,)) or is_transformed() or torch.is_autocast_enabled(x.device.type))


def is_followed(values: Iterable[object]) -> bool:
    """Whether more than autograd follows what is computed from these values, so that it must be a registered operator.

    Graphs do, tensors without values, and subclasses of tensors. So do dispatch modes, such as those that count FLOPs
    or choose what a checkpoint saves, because they know operators by name. And
    `torch.autograd.grad(..., is_grads_batched=True)` maps over gradients in a way of its own.
    """
    if is_recorded() or _get_current_dispatch_mode() is not None:
        return True
    for each in values:
        if isinstance(each, Tensor) and (
            type(each) not in _PLAIN or each.is_meta or functorch.is_legacy_batchedtensor(each)
        ):
            return True
    return False


_PLAIN = (Tensor, nn.Parameter)


def is_captured() -> bool:
    """Whether a CUDA graph is being captured: the host can neither wait for values nor capture another one."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def has_onednn() -> bool:
    """Whether `onednn_linear` is there, and the user has not turned oneDNN off."""
    return torch._C._get_mkldnn_enabled() and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` on the CPU by oneDNN. It allocates the result, and autograd does not record it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def has_onednn_packing() -> bool:
    """Whether `onednn_pack` is there."""
    return has_onednn() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def onednn_pack(weight: Tensor) -> Tensor:
    """A weight of `onednn_linear`, float32 or bfloat16, in the layout that oneDNN reads fastest.

    The result is opaque: it can be multiplied, and `to_dense` gives the weight back bit for bit, but it has no storage
    to copy or save.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


class _ReadOnly(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    @property
    def data(self) -> Tensor:
        raise RuntimeError(
            "This is a copy of a packed weight, and what is written to it would be lost; clone it first."
        )


def read_only(make: Callable[[], Tensor]) -> Tensor:
    """The tensor that a function makes, which then refuses to be changed, except in inference mode."""
    with torch.inference_mode():  # outside of it, tensors that are made there, and views of them, refuse
        return make().as_subclass(_ReadOnly)


def multiply_bytes(x: Tensor, weight: Tensor) -> Tensor:
    """`(m, k)`, uint8 on the CPU and int8 on a GPU, times int8 `(k, n)`: int32 `(m, n)`, exact.

    A GPU needs more than 16 rows, and multiples of 8 for k and n.
    """
    return torch._int_mm(x, weight)


def multiply_float8(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """scale · weight_scale · (x · weight) + bias on a GPU, rounded once: `(m, n)` in `dtype`.

    Args:
        x, weight: float8_e4m3fn `(m, k)` and `(k, n)`, the second one transposed in memory; k and n multiples of 16.
        scale, weight_scale: float32 `(m, 1)` and `(1, n)`.
        bias: `(n,)` in `dtype`, or None.
        dtype: bfloat16 or float16.
    """
    # Hopper's fast accumulation adds with fewer digits than float32 has, but with far more than the operands have.
    return torch._scaled_mm(
        x, weight, scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16; elsewhere PyTorch emulates them."""
    return torch.cpu._is_avx512_bf16_supported() or has_amx()


def has_amx() -> bool:
    """Whether the CPU has matrix instructions, with which oneDNN is several times as fast in 16 bits as by vectors."""
    return torch.cpu._is_amx_tile_supported()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's parameters alone determine what a call computes: it is untouched, and they are dense."""
    if not is_untouched(module, kind):
        return False
    bias = getattr(module, "bias", None)
    return _is_dense(module.weight) and (bias is None or _is_dense(bias))


def _is_dense(parameter: object) -> bool:
    """Whether a parameter is plain numbers in memory: not missing, quantised, sharded or sparse."""
    return type(parameter) in (nn.Parameter, Tensor) and parameter.layout is torch.strided


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs only the forward of its kind, without hooks, so that other code can replace it.

    Always False while a graph is exported: it records what the modules themselves do.
    """
    return (
        not is_exported()
        and type(module) is kind
        and not any(_act(getattr(module, name)) for name in _HOOKS)
        and "forward" not in module.__dict__  # which accelerate's offloading sets
        and not _has_any_global_hook()
    )


class Structure:
    """Which modules there are, of which classes, inside of which others, and their hooks.

    It is made once, and asked before each use of what was found out then. All of it is compared without a call for each
    module, and with few of their objects: a forward has pushed them out of the caches.

    Attributes:
        hooked: whether a hook or a replaced forward of a module runs in every call.
    """

    def __init__(self, modules: list[nn.Module], called: list[nn.Module]) -> None:
        """
        Args:
            modules: the modules; what they contain directly is compared too.
            called: those of them whose hooks matter.
        """
        self._modules = modules
        # Dictionaries that modules change in place.
        self._children = [each.__dict__["_modules"] for each in modules if each.__dict__["_modules"]]
        self._called = [each.__dict__ for each in called]
        self._handles = RemovableHandle.next_id  # counts all hooks that were ever registered
        self._hooks = self._read_hooks()
        self._state = self._read()  # which keeps all objects, so that no other one gets the place of one of these
        has_global_hooks, has_forwards, *_ = self._state
        self.hooked = any(map(_acts, self._hooks)) or has_global_hooks or has_forwards

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        return self._has_same_hooks() and self._read() == self._state

    def _has_same_hooks(self) -> bool:
        handles = RemovableHandle.next_id
        if self._hooks or handles != self._handles:  # else there were none to remove, and none came
            if self._read_hooks() != self._hooks:
                return False
            self._handles = handles
        return True

    def _read_hooks(self) -> list[Callable]:
        return [hook for each in self._called for name in _HOOKS for hook in each[name].values()]

    def _read(self) -> tuple:
        has_forwards = any(map(dict.__contains__, self._called, repeat("forward")))
        children = list(chain.from_iterable(map(dict.values, self._children)))
        return bool(_has_any_global_hook()), has_forwards, list(map(type, self._modules)), children


class Footprint:
    """What decides what the modules inside a module compute: its structure, and where its weights lie.

    It is made once, and asked before each use of what was prepared then, such as a captured graph.

    Attributes:
        is_plain: False if a hook or a replaced forward of such a module runs in every call, or if a weight has no
            address, because it is a tensor of another kind.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = [module]
        for each in modules:  # which grows meanwhile
            # A dropout is not called: its rate and mode are read when seeds are drawn.
            modules += [
                child for child in each._modules.values() if child is not None and not isinstance(child, nn.Dropout)
            ]
        self._structure = Structure(modules, modules[1:])
        members = [each.__dict__ for each in modules]
        self._tensors = [each[name] for each in members for name in ("_parameters", "_buffers") if each[name]]
        self._attributes = [(each, name) for each in members for name in _ATTRIBUTES if name in each]
        self._kept = self._values()  # so that no other object gets the number of one of these
        self._state = self._read()
        self.is_plain = not self._structure.hooked and self._places() is not None

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        return self._structure.is_current() and self._read() == self._state

    def _values(self) -> list[object]:
        return [each.get(name) for each, name in self._attributes]

    def _read(self) -> tuple:
        return [*map(id, self._values())], self._places()

    def _places(self) -> list[list] | None:
        """Which each weight is, where it lies and how it is read there; None if one has no address."""
        weights = [weight for each in self._tensors for weight in each.values() if weight is not None]
        try:
            # A part of a weight, or its transpose, may start where the weight did. And another tensor may hold the
            # same numbers, as `nn.Parameter(weight.data)` does: gradients are due to the one that the module has now.
            return [list(map(read, weights)) for read in _PLACES]
        except RuntimeError:
            return None


@contextlib.contextmanager
def outside_workers() -> Iterator[None]:
    """In here `torch.utils.data.get_worker_info()` is None, in a worker of a `DataLoader` too."""
    info, data_worker._worker_info = data_worker._worker_info, None
    try:
        yield
    finally:
        data_worker._worker_info = info


def _act(hooks: dict[int, Callable]) -> bool:
    """Whether hooks do something: those that transformers leaves on modules record outputs only while it asks."""
    return bool(hooks) and any(map(_acts, hooks.values()))


def _acts(hook: Callable) -> bool:
    return getattr(hook, "__module__", None) != _RECORDER


_RECORDER = "transformers.utils.output_capturing"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Functions in C, because they are called for hundreds of weights; each for one attribute, as a pair takes longer.
_PLACES = (id, type, Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"))

# Of modules that this library computes by itself.
_ATTRIBUTES = ("eps", "scale", "scaling", "num_attention_heads", "packed")
