"""Modules for inference: on a CPU, linears and word tables that hold their weights packed, in bfloat16 or in int8.

They take the places of `nn.Linear` and `nn.Embedding` and give up the original weights. Their weights have no gradient.
Those for a GPU are in `inference_gpu.py`.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flags, modes, reference
from .matmul import fastest
from .matmul.libraries import ONEDNN_BFLOAT16, ONEDNN_PACKED
from .native import packed

_ROWS = 4096  # of a weight that are rounded at once


class InferenceModule(nn.Module):
    """What all such modules share: they refuse training, and a change of their dtype or device.

    Attributes:
        weights: the form of the weights, as `optimize` takes it.
        dtype: of the weight.
        was_loaded: whether `load_state_dict` has given the module a weight, which its original does not have then.
    """

    weights: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    was_loaded: bool = False

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        """What a state of this module holds for a floating-point weight, by names without a prefix."""
        return {"weight": weight.to(self.dtype)}

    def _load_from_state_dict(self, state: dict, prefix: str, *arguments: object) -> None:
        """Rounds a weight that comes without its scales, as from a model that is not rounded."""
        weight, scale = (state.get(f"{prefix}{name}") for name in ("weight", "weight_scale"))
        self.was_loaded = self.was_loaded or weight is not None
        if weight is not None and scale is None and weight.is_floating_point() and weight.shape == self.weight.shape:
            state = {**state, **{f"{prefix}{name}": each for name, each in self.rounded(weight).items()}}
        super()._load_from_state_dict(state, prefix, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        return _compute_uncompiled(self, x) if torch.compiler.is_compiling() else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The result of a call."""
        raise NotImplementedError

    def check_inference(self, x: Tensor) -> None:
        """Refuses a call with this input where gradients are needed, or while a graph is exported."""
        needed = torch.is_grad_enabled() and (
            self.training or any(each.requires_grad for each in (x, *self.parameters()))
        )
        if needed or modes.is_transformed():
            raise RuntimeError(untrainable(type(self).__name__, self.weights))
        if modes.is_exported():
            raise RuntimeError(
                f"{type(self).__name__} cannot be exported: {self.weights} weights run with erniem_fast only. Export "
                f"the model before erniem_fast.optimize, or after erniem_fast.restore."
            )

    def check_change(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Refuses a function that `nn.Module` applies to all tensors of a model, if it changes dtype or device."""
        dtype, device = self.unrounded()
        moved = fn(torch.empty(0, dtype=dtype, device=device))
        if (moved.dtype, moved.device) != (dtype, device):
            place = "the CPU" if device.type == "cpu" else device
            raise RuntimeError(
                f"A model with {self.weights} weights stays in {str(dtype).removeprefix('torch.')} on {place}, not in "
                f"{moved.dtype} on {moved.device}; call erniem_fast.restore(model) first."
            )

    def unrounded(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of what is not rounded in the model."""
        return torch.float32, torch.device("cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.check_change(fn)

        def without_cast(tensor: Tensor) -> Tensor:
            """A cast to the model's dtype leaves weights and scales in theirs."""
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor

        return super()._apply(without_cast, recurse)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight" and self.__dict__.get("packed") is not None:
            raise AttributeError(
                f"The weight of {type(self).__name__} is packed and cannot be replaced; call "
                f"erniem_fast.restore(model), change it, and call erniem_fast.optimize again."
            )
        super().__setattr__(name, value)


def untrainable(name: str, weights: str) -> str:
    """The message of the error where gradients would have to flow through weights of a form."""
    return (
        f"{name} cannot be trained, and no gradient flows through it: {weights} weights are for inference. Call "
        f"model.eval() and use torch.inference_mode(), or erniem_fast.restore(model) before training."
    )


@torch.compiler.disable
def _compute_uncompiled(module: InferenceModule, x: Tensor) -> Tensor:
    """torch.compile cannot record these products: it leaves its graph for them."""
    return module.compute(x)


def inference_module(model: nn.Module) -> InferenceModule | None:
    """The first inference module in a model; None if its weights are as they were loaded."""
    return next((module for module in model.modules() if isinstance(module, InferenceModule)), None)


class InferenceModel(nn.Module):
    """A model that may hold inference modules: it refuses changes that these do not take, before any tensor changes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        found = inference_module(self)
        if found is not None:
            found.check_change(fn)
        return super()._apply(fn, recurse)

    def resize_token_embeddings(self, *arguments, **options) -> nn.Module:
        """As in transformers.

        Raises:
            ValueError: the word table's rows are rounded, and would get another number.
        """
        table = self.get_input_embeddings()
        try:
            return super().resize_token_embeddings(*arguments, **options)
        except TypeError as error:  # transformers' for a table that is no nn.Embedding
            if not isinstance(table, InferenceEmbedding):
                raise
            raise ValueError(
                f"The word table has {table.weights} weights and cannot be resized; call erniem_fast.restore(model) "
                f"first, or load the original checkpoint."
            ) from error


_WORD_TABLE = "embeddings.word_embeddings"


def places(bare: nn.Module) -> dict[str, nn.Module | None]:
    """The modules of a bare model that inference modules can replace, by name, each once; None for missing ones.

    Args:
        bare: a model that has `embeddings`, and a `PostLNStack` as `encoder`.
    """
    encoder = bare.encoder
    linears = [path for index in range(len(encoder.all_layers())) for path in encoder.linear_paths(index)]
    names = [_WORD_TABLE, *(f"encoder.{path}" for path in linears)]
    present = dict(bare.named_modules(remove_duplicate=False))
    found = {name: present.get(name) for name in names}
    first = {module: name for name, module in reversed(found.items())}  # layers may be the same module
    return {name: module for name, module in found.items() if module is None or first[module] == name}


def freeze(bare: nn.Module) -> list[str]:
    """Freezes the parameters of embeddings and layers; returns the names of those that were not frozen."""
    parameters = dict(bare.named_parameters())
    trained = [name for name, each in parameters.items() if each.requires_grad and not name.startswith("pooler.")]
    for name in trained:
        parameters[name].requires_grad_(False)
    return trained


@torch.no_grad()
def leave_file(model: nn.Module) -> None:
    """Copies the parameters that are left, so that the file can go that safetensors has mapped for all weights."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            with torch.inference_mode(parameter.is_inference()):  # a model that was made there fails with other tensors
                parameter.data = parameter.data.clone()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as an array, which pickles by value.

    A tensor would reach a spawned process as shared memory, which goes when the tensor does; this one is made for the
    pickle, and nothing else keeps it.
    """
    return tensor.view(torch.uint8).numpy()


def _of_bytes(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).view(dtype)


class _OpaqueLinear(InferenceModule):
    """A linear with a weight in oneDNN's own layout, which has no storage: it is saved and copied as a plain tensor.

    Attributes:
        dtype: of the weight and of the products.
        packed: the weight, see `modes.onednn_pack`.
        bias: float32 `(out_features,)`, or None.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "_OpaqueLinear":
        """The linear with its weight in this form."""
        packed = cls()
        packed.out_features, packed.in_features = linear.weight.shape
        packed.packed = modes.onednn_pack(linear.weight.to(cls.dtype))
        packed.bias = linear.bias
        return packed.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight, `(out_features, in_features)`, which refuses to be changed."""
        return modes.read_only(self._unpacked)

    def _unpacked(self) -> Tensor:
        return self.packed.to_dense(self.dtype)

    def compute(self, x: Tensor) -> Tensor:
        return modes.onednn_linear(x.to(self.dtype), self.packed, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._unpacked()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, strict: bool, *lists: list[str]) -> None:
        missing, unexpected, errors = lists
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        key, shape = f"{prefix}weight", (self.out_features, self.in_features)
        if key not in state:
            missing.extend([key] if strict else [])
        elif tuple(state[key].shape) != shape:
            errors.append(f"{key} has shape {tuple(state[key].shape)}, but the model needs {shape}.")
        else:
            self.packed = modes.onednn_pack(state[key].to(self.dtype))
        if key in unexpected:
            unexpected.remove(key)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "packed": _bytes_of(self._unpacked())}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({**state, "packed": modes.onednn_pack(_of_bytes(state["packed"], self.dtype))})


class OnednnPackedLinear(_OpaqueLinear):
    """A linear with a float32 weight in oneDNN's layout: `(..., in_features)` to `(..., out_features)`, in float32."""

    weights = "packed"
    dtype = torch.float32


class OnednnBFloat16Linear(_OpaqueLinear):
    """A linear with a bfloat16 weight: `(..., in_features)` to `(..., out_features)` in the input's dtype.

    Inputs and results are rounded to bfloat16. Sums are in float32, and so is the bias.
    """

    weights = "bfloat16"
    dtype = torch.bfloat16


class NativeLinear(InferenceModule):
    """A linear whose weight is held as native products read it, where there are such products.

    Attributes:
        dtype: of the weight.
        weight: `(out_features, in_features)`; if `packed` holds it, a copy, which refuses to be changed.
        weight_scale: factors of the weight's rows, float32 `(out_features,)`; None for none.
        bias: float32 `(out_features,)`, or None.
        packed: the weight in the native product's order; None until there is a native product.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=self.dtype))
        self.register_buffer("weight_scale", None)
        self.register_parameter("bias", _bias(out_features) if bias else None)
        self.packed: Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> "NativeLinear":
        """The linear with its weight rounded."""
        with torch.device("meta"):
            rounded = cls(*reversed(linear.weight.shape), bias=linear.bias is not None)
        rounded.hold(linear.weight.detach())
        rounded.bias = linear.bias
        rounded.pack()
        return rounded.train(linear.training)

    def hold(self, weight: Tensor) -> None:
        """Rounds a float32 weight and holds it."""
        raise NotImplementedError

    def is_native(self) -> bool:
        """Whether there is a native product for such a weight."""
        return packed.multiplies(self.dtype)

    def operands(self) -> packed.PackedLinear:
        """What native products take, if there is `packed`."""
        return packed.PackedLinear(self.packed, self.weight_scale, self.bias, self.dtype)

    def multiply(self, rows: Tensor) -> Tensor:
        """The product by PyTorch."""
        raise NotImplementedError

    def pack(self) -> None:
        """Gives up the plain weight for the packed one, if there is a native product to use that."""
        if self.packed is None and self.is_native():
            self.packed = packed.pack(self.weight)
            self._buffers.pop("weight", None)

    def compute(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        self.pack()
        if self.packed is not None and multiplies_natively(rows):
            out = rows.new_empty(len(rows), self.out_features)
            packed.linear(rows, *self.operands(), out=out)
        else:
            out = self.multiply(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def __getattr__(self, name: str) -> object:
        if name == "weight" and self.__dict__.get("packed") is not None:
            return modes.read_only(self._unpacked)
        return super().__getattr__(name)

    def _unpacked(self) -> Tensor:
        if self.packed is None:
            return self.weight
        return packed.unpack(self.packed, self.out_features, self.in_features, self.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._unpacked()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: object) -> None:
        if self.packed is not None:
            weight, self.packed = self._unpacked(), None
            self.register_buffer("weight", weight)
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, object]:
        """With the packed weight in the original order, because another machine may be unable to use it."""
        if self.packed is None:
            return {**self.__dict__}
        return {**self.__dict__, "packed": _bytes_of(self._unpacked()), "_buffers": {**self._buffers}}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({**state, "packed": None})
        if state["packed"] is not None:
            self.register_buffer("weight", _of_bytes(state["packed"], self.dtype))


class PackedLinear(NativeLinear):
    """A linear with a float32 weight: `(..., in_features)`, floating point, to float32 `(..., out_features)`.

    Attributes as `NativeLinear`'s.
    """

    weights = "packed"
    dtype = torch.float32

    def hold(self, weight: Tensor) -> None:
        self.weight = weight.clone()

    def multiply(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)


class BFloat16Linear(NativeLinear):
    """A linear with a bfloat16 weight: `(..., in_features)`, floating point, to float32 `(..., out_features)`.

    Inputs are rounded to bfloat16. Sums, bias and results are in float32. Attributes as `NativeLinear`'s.
    """

    weights = "bfloat16"
    dtype = torch.bfloat16

    def hold(self, weight: Tensor) -> None:
        self.weight = weight.to(self.dtype)

    def multiply(self, rows: Tensor) -> Tensor:
        return F.linear(rows.to(self.dtype).float(), self.weight.float(), self.bias)


class Int8Linear(NativeLinear):
    """A linear with an int8 weight: `(..., in_features)`, floating point, to float32 `(..., out_features)`.

    Each row of the weight has a scale of its own, and so has each row of the input, which is rounded to 8 bits here.
    A token's result depends on that token alone, and not on other tokens of a batch. The arithmetic is that of
    `reference.quantised_linear`. Attributes as `NativeLinear`'s.
    """

    weights = "int8"
    dtype = torch.int8

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_scale = torch.empty(out_features, dtype=torch.float32)

    def hold(self, weight: Tensor) -> None:
        self.weight, self.weight_scale = round_rows(weight)

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        return _int8_state(weight)

    def is_native(self) -> bool:
        return super().is_native() and self.in_features <= packed.MOST_FEATURES

    def multiply(self, rows: Tensor) -> Tensor:
        return _int8_linear(rows, self.weight, self.weight_scale, self.bias)


def _bias(features: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(features, dtype=torch.float32))


LINEARS = {kind.weights: kind for kind in (PackedLinear, BFloat16Linear, Int8Linear)}


def linear_kind(weights: str) -> type[InferenceModule]:
    """The class of linears for a form of weights on this machine's CPU."""
    if weights == "packed" and fastest.packing() == ONEDNN_PACKED:
        return OnednnPackedLinear
    if weights == "bfloat16" and fastest.bfloat16() == ONEDNN_BFLOAT16:
        return OnednnBFloat16Linear
    return LINEARS[weights]


def is_plain_inference(module: nn.Module, kind: type[InferenceModule] | None = None) -> bool:
    """Whether a call of an inference module runs only its own forward, so that no hook keeps its result.

    Args:
        module: any module.
        kind: the class that is wanted; None for any.
    """
    return isinstance(module, kind or InferenceModule) and modes.is_untouched(module, type(module))


def attends_in_bfloat16(linears: Sequence[nn.Module]) -> bool:
    """Whether attention after these three linears computes in bfloat16, as it does in native layers."""
    return all(
        isinstance(linear, NativeLinear) and packed.attention_dtype(linear.dtype) == torch.bfloat16
        for linear in linears
    )


def multiplies_natively(x: Tensor) -> bool:
    """Whether products of x are native where a linear is packed: neither the flags nor an observer forbid it."""
    return modes.is_plain_call(x) and _allows_native()


@flags.while_held
def _allows_native() -> bool:
    return flags.read(flags.KERNELS) == "auto" and flags.read(flags.VERIFY) == "0"


def _int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.quantised_linear`, bit for bit, by PyTorch's product of bytes."""
    tokens = reference.quantise_tokens(x, packed.levels() if packed.objection() is None else 255)
    # A row of ones gives the sums over the weight's rows, which are those of `zero` times a row.
    values = torch.cat([tokens.values.to(torch.uint8), x.new_ones(1, x.shape[1], dtype=torch.uint8)])
    products = modes.multiply_bytes(values, weight.t())
    product = (products[:-1] - tokens.zero * products[-1]).float() * (tokens.scale * weight_scale)
    return product if bias is None else product + bias


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_weight`, some rows at a time: a word table's temporary tensors would take gigabytes."""
    values, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        values[rows], scales[rows] = reference.quantise_weight(weight[rows])
    return values, scales


def _int8_state(weight: Tensor) -> dict[str, Tensor]:
    return dict(zip(("weight", "weight_scale"), round_rows(weight.float()), strict=True))


class InferenceEmbedding(InferenceModule):
    """A table whose rows are held in fewer bits: integers `(...)` to float32 `(..., embedding_dim)`.

    Attributes:
        weight: `(num_embeddings, embedding_dim)` in `dtype`.
        weight_scale: factors of the rows, float32 `(num_embeddings,)`; None for none.
        padding_idx: as in `nn.Embedding`; it has no effect without gradients.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.register_buffer("weight", torch.empty(num_embeddings, embedding_dim, dtype=self.dtype))
        self.register_buffer("weight_scale", None)

    @classmethod
    def of(cls, table: nn.Embedding) -> "InferenceEmbedding":
        """The table with its rows rounded."""
        with torch.device("meta"):
            rounded = cls(*table.weight.shape, table.padding_idx)
        rounded.hold(table.weight.detach())
        return rounded.train(table.training)

    def hold(self, weight: Tensor) -> None:
        """Rounds float32 rows and holds them."""
        self.weight = weight.to(self.dtype)

    def compute(self, ids: Tensor) -> Tensor:
        return reference.word_rows(ids, self.weight, scale=self.weight_scale).float()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


class BFloat16Embedding(InferenceEmbedding):
    """A table with its rows in bfloat16."""

    weights = "bfloat16"
    dtype = torch.bfloat16


class Int8Embedding(InferenceEmbedding):
    """A table with its rows in int8, and a scale for each."""

    weights = "int8"
    dtype = torch.int8

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.weight_scale = torch.empty(num_embeddings, dtype=torch.float32)

    def hold(self, weight: Tensor) -> None:
        self.weight, self.weight_scale = round_rows(weight)

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        return _int8_state(weight)


TABLES = {kind.weights: kind for kind in (BFloat16Embedding, Int8Embedding)}
