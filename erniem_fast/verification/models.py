"""`verify(model)`: a model beside the stock one on its own device: errors of its outputs, their bounds, and speed."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import families, flags, processes
from ..families.layout import restarts
from ..inference import InferenceEmbedding, InferenceModule, inference_module
from ..modeling import ErnieMModel
from ..objects import encoders, holders
from ..optimize import optimize, restore
from .equivalence import Comparison, compare
from .hard_batches import hard_batches, ragged_batch

# How far rounded weights may move outputs, relative to their root mean square. The batches of `hard_batches` moved the
# hidden states of multilingual-e5-small by 0.0044 and 0.037, in bfloat16 and int8; those of random weights by less.
# In float8, products are about 3 times as far off as in int8: it has 4 digits where int8 has 6 for an average number.
_ROUNDING = {"bfloat16": 0.02, "int8": 0.15, "float8": 0.4}

# The stock model's largest error is a matter of luck where an output has few numbers, as the logits of one row. So the
# bound has this many units in the last place of the largest number more, divided by how many numbers there are.
_LUCK = 2048

_LEAST_SECONDS, _LEAST_ROUNDS = 1.0, 3  # of a timing

_PREPARED = {"prepared", "checked"}  # attributes in which modules keep what calls have prepared

_PLAIN = {flags.KERNELS.name: "off", flags.PACKING.name: "0"}

# Not compared: a loss over columns differs where there is padding, and attentions are transformers' own.
_LEFT_OUT = ("loss", "attentions")

Inputs = dict[str, object]


@dataclass(frozen=True)
class ModelVerification:
    """What `verify` found for one model of an object.

    Attributes:
        name: the model's class.
        place: its dtype and device, in words.
        weights: the form of its weights, as `optimize` takes it; None if they are as they were loaded.
        stock: what it is compared with, in words.
        outputs: the error of each output and its bound, by name. With rounded weights both are relative to the root
            mean square of the output, and outputs of heads have no bound; else errors are the largest of a number.
        fallbacks: why calls ran by transformers' own forward; empty if none did.
        seconds, stock_seconds: of a call, optimised and stock.
    """

    name: str
    place: str
    weights: str | None
    stock: str
    outputs: dict[str, Comparison]
    fallbacks: tuple[str, ...]
    seconds: float
    stock_seconds: float

    @property
    def passed(self) -> bool:
        return all(each.holds for each in self.outputs.values())

    @property
    def _title(self) -> str:
        weights = f", {self.weights} weights" if self.weights else ""
        return f"{self.name}, {self.place}{weights}: {'passed' if self.passed else 'FAILED'}"

    @property
    def _times(self) -> str:
        times = f"{1e3 * self.seconds:.1f} ms a call, {self.stock} {1e3 * self.stock_seconds:.1f} ms"
        return f"{times}: {self.stock_seconds / self.seconds:.2f} times as fast"

    def summary(self) -> str:
        """The verdict, the error that came closest to its bound, and the times, in a line."""
        name, worst = max(self.outputs.items(), key=lambda item: item[1].ratio)
        line = f"{self._title}, largest error {worst.ratio:.2f} of its bound ({name}), {self._times}"
        return "; ".join([line, *self._reasons])

    @property
    def _reasons(self) -> list[str]:
        return [f"runs by transformers' own forward: {reason}" for reason in self.fallbacks]

    def __str__(self) -> str:
        kind = "relative error" if self.weights in _ROUNDING else "largest error"
        width = max(map(len, ("output", *self.outputs)))
        lines = [
            self._title,
            f"  {'output':{width}}  {kind:>14}  {'bound':>8}",
        ]
        for name, each in self.outputs.items():
            lines.append(f"  {name:{width}}  {each.error:14.1e}  {each.bound:8.1e}{'' if each.holds else '  FAILED'}")
        return "\n".join([*lines, *(f"  {reason}" for reason in self._reasons), f"  {self._times}"])


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Printed, it is a table; as a condition, it is true if everything passed.

    Attributes:
        models: what was found for each model in the object.
    """

    models: tuple[ModelVerification, ...]

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.models)

    def __bool__(self) -> bool:
        return self.passed

    def summary(self) -> str:
        """A line for each model."""
        return "\n".join(each.summary() for each in self.models)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.models))


def verify(model: object, batch: Mapping[str, object] | None = None) -> Verification:
    """Compares a model with the stock one on its device: is it right there, and how fast is it?

    The errors of both are their distances from the stock model in float64. The optimised model's may be twice as large
    as the stock model's, plus a few units in the last place. Rounded weights are compared with the original ones, by a
    bound of their precision; if the originals can no longer be had, with the rounded ones in float64. Stock is
    transformers' own forward, and for ERNIE-M this package's in plain PyTorch with padding.

    A model that is not optimised is compared as `optimize` would make it. The object is left as it is. What has to
    change is changed in a copy, which takes the memory of a model in float64.

    Args:
        model: an object that `optimize` takes, optimised or not.
        batch: arguments of the model's forward, as tokenizers make them, on any device. None for hard ones made from
            the model's config: sequences of unequal lengths, padding on the right and on the left, holes, single
            tokens, and one row as long as the model allows, up to 512 tokens. Heads with logits for each word of the
            vocabulary, and classes that are not transformers', are then left out: only the encoder is compared.

    Returns:
        Errors, bounds and times. A failure is no error of Python: write `assert verify(model)` to make it one.

    Raises:
        TypeError: there is no model in the object that `optimize` takes; or `batch` is no mapping.
        ValueError: `batch` is packed input of a model of transformers, which does not keep its sequences apart; or the
            model is on the meta device.
    """
    if batch is not None and not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is of type {type(batch).__name__}; pass a dict of a forward's arguments, as tokenizers make."
        )
    with processes.silent():
        return Verification(tuple(_verify(_holder(model, bare, batch), bare, batch) for bare in encoders(model)))


def _verify(holder: PreTrainedModel, bare: nn.Module, batch: Mapping[str, object] | None) -> ModelVerification:
    is_ours, name = isinstance(bare, ErnieMModel), type(holder).__name__
    if bare.device.type == "meta":
        raise ValueError(f"The {name} is on the meta device, where there are no numbers to compare; load its weights.")
    if batch is not None and not is_ours:
        _refuse_packed(batch, name)
    place = f"{str(bare.dtype).removeprefix('torch.')} on {bare.device}"
    with _evaluating(holder):
        copied = copy.deepcopy(holder)
        if is_ours or families.is_packed(bare):
            fast, (stock, description) = _Side(holder), _as_loaded(copied)
        else:
            fast, stock, description = _Side(optimize(copied)), holder, "stock"
        stock = _Side(stock, _PLAIN if is_ours else {})
        batches, timed = _batches(fast.model, batch)
        module = inference_module(fast.model)
        with _fallbacks(fast.model.base_model) as fallbacks:
            results = fast.outputs(batches)
            seconds, stock_seconds = _times([partial(fast.call, timed), partial(stock.call, timed)])
        expected = stock.outputs(batches)
        exact = _Side(_in_float64(copied), stock.settings).outputs(batches)
    weights = None if module is None else module.weights
    outputs = {key: _compare(key, results[key], expected[key], exact[key], weights) for key in results}
    return ModelVerification(name, place, weights, description, outputs, tuple(fallbacks), seconds, stock_seconds)


def _refuse_packed(batch: Mapping[str, object], name: str) -> None:
    """Refuses packed input, because transformers' models attend across the sequences of a row."""
    positions, is_packed = batch.get("position_ids"), batch.get("cu_seq_lens_q") is not None
    if isinstance(positions, Tensor) and positions.dim() == 2 and batch.get("attention_mask") is None:
        is_packed = is_packed or restarts(positions)[0] is not None
    if is_packed:
        raise ValueError(
            f"batch is packed (cu_seq_lens_q, or position_ids that start anew), but packed sequences attend to each "
            f"other in transformers' {name}; pass rows with padding."
        )


# --- The models ------------------------------------------------------------------------------------------------------


def _holder(model: object, bare: nn.Module, batch: Mapping[str, object] | None) -> PreTrainedModel:
    """The outermost model around a bare one that takes the batch; the bare one if there is no other."""
    around = [each for each in holders(model) if each.base_model is bare]
    return next((each for each in around if batch is not None or _takes_tokens(each)), bare)


def _takes_tokens(model: PreTrainedModel) -> bool:
    """Whether it is known that a model takes tokens alone, and has no logits for each word, gigabytes in float64."""
    known = type(model).__module__.startswith(("transformers.", "erniem_fast."))
    return known and model.get_output_embeddings() is None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode inside a `with` block, and as before after it, without what calls have prepared."""
    before = [(module, module.training, vars(module).keys() & _PREPARED) for module in model.modules()]
    for module, *_ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training, prepared in before:
            module.training = training
            for name in _PREPARED - prepared:
                vars(module).pop(name, None)


def _as_loaded(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The stock model of an optimised one, which is changed, and what it is in words."""
    try:
        return restore(model), "stock"
    except ValueError:  # the original weights are lost
        (bare,) = encoders(model)
        for name, module in list(bare.named_modules()):
            if isinstance(module, InferenceModule):
                bare.set_submodule(name, _unrounded(module))
        vars(bare).pop("originals", None)
        return restore(model), "stock with the rounded weights"


def _unrounded(module: InferenceModule) -> nn.Module:
    """A stock module with the rounded weight."""
    scale, (dtype, _) = getattr(module, "weight_scale", None), module.unrounded()
    weight = module.weight.float() if scale is None else module.weight * scale[:, None]
    weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if isinstance(module, InferenceEmbedding):
        return nn.Embedding(*weight.shape, module.padding_idx, _weight=weight.data)
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight, linear.bias = weight, module.bias
    return linear


def _in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model in float64; the model given is changed."""
    model = restore(model).double()
    if not isinstance(model.base_model, ErnieMModel):
        model.set_attn_implementation("eager")  # the others may lack float64
    return model


@contextmanager
def _fallbacks(bare: nn.Module) -> Iterator[set[str]]:
    """The reasons why calls inside a `with` block run by transformers' own forward."""
    members, found = vars(bare), set()
    told = members.get("fallbacks")
    members["fallbacks"] = found
    try:
        yield found
    finally:
        members.pop("fallbacks")
        if told is not None:
            members["fallbacks"] = told


# --- Batches and outputs ---------------------------------------------------------------------------------------------


def _batches(fast: PreTrainedModel, given: Mapping[str, object] | None) -> tuple[list[Inputs], Inputs]:
    """The batches to compare, and the one to time."""
    bare = fast.base_model
    if given is not None:
        moved = {name: each.to(bare.device) if isinstance(each, Tensor) else each for name, each in given.items()}
        return [moved], moved
    batches = [*hard_batches(bare).values(), ragged_batch(bare)]
    if type(fast).__name__.endswith("ForMultipleChoice"):
        batches = [{name: each[None] for name, each in batch.items()} for batch in batches]
    return batches, batches[-1]


@dataclass(frozen=True)
class _Side:
    """A model, and the flags' values that it runs with."""

    model: PreTrainedModel
    settings: dict[str, str] = field(default_factory=dict)

    def call(self, inputs: Inputs) -> object:
        with torch.inference_mode(), flags.held(flags.Settings(self.settings)):
            return self.model(**inputs)

    def outputs(self, batches: list[Inputs]) -> dict[str, Tensor]:
        """The numbers of each output at real tokens, for all batches: `(numbers,)`, by the output's name."""
        found = {}
        for inputs in batches:
            for name, value in self._named_outputs(inputs):
                found.setdefault(name, []).append(_at_tokens(value, self._real(inputs)).flatten())
        return {name: torch.cat(values) for name, values in found.items()}

    def _named_outputs(self, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        encoded, bare = [], self.model.base_model
        hook = bare.register_forward_hook(lambda module, given, output: encoded.append(output))
        try:
            output = self.call(inputs)
        finally:
            hook.remove()
        yield from _tensors(encoded[-1])
        if bare is not self.model:
            yield from _tensors(output, "head: ")

    def _real(self, inputs: Inputs) -> Tensor:
        """bool `(rows, columns)`, True where outputs are compared."""
        ids, mask, bare = inputs.get("input_ids"), inputs.get("attention_mask"), self.model.base_model
        given = inputs["inputs_embeds"][..., 0] if ids is None else ids
        if mask is not None and mask.shape == given.shape:
            real = mask != 0
        elif mask is None and ids is not None and isinstance(bare, ErnieMModel):
            real = ids != bare.config.pad_token_id
        else:
            real = torch.ones(given.shape, dtype=torch.bool, device=given.device)
        return real.flatten(0, -2)


def _tensors(output: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in an output, with their names."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield prefix.strip(" .") or "output", output
        return
    named = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    for name, value in named:
        if name not in _LEFT_OUT:
            yield from _tensors(value, f"{prefix}{name}.")


def _at_tokens(x: Tensor, real: Tensor) -> Tensor:
    """What an output has for real tokens, or for rows that have some."""
    if x.shape[:2] == real.shape:
        return x[real]
    return x[real.any(1)] if x.shape[:1] == real.shape[:1] else x


def _compare(name: str, result: Tensor, stock: Tensor, exact: Tensor, weights: str | None) -> Comparison:
    if weights in _ROUNDING:
        error = (result.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
        return Comparison(error.item(), inf if name.startswith("head") else _ROUNDING[weights])
    found = compare(result, (stock, exact))
    if not result.numel():
        return found
    luck = _LUCK / result.numel() * torch.finfo(result.dtype).eps * exact.abs().amax().item()
    return Comparison(found.error, found.bound + luck)


def _times(calls: list[Callable[[], object]]) -> list[float]:
    """The seconds of each call, medians of calls in turn."""
    for call in calls:
        call()
    seconds, start = [[] for _ in calls], time.perf_counter()
    while len(seconds[0]) < _LEAST_ROUNDS or time.perf_counter() - start < _LEAST_SECONDS:
        for call, taken in zip(calls, seconds, strict=True):
            _synchronize()
            before = time.perf_counter()
            call()
            _synchronize()
            taken.append(time.perf_counter() - before)
    return [median(each) for each in seconds]


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
