"""`optimize` and `restore`: models of transformers on our layers, and weights in another form for inference."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import families, modes
from .inference import LINEARS, TABLES, InferenceModule, freeze, inference_module, leave_file, linear_kind, places
from .inference_gpu import DTYPES, GPU_LINEARS, ScaledLinear, gpu_objection
from .matmul import fastest
from .native import packed
from .objects import encoders, holders, roots, tell
from .post_ln import PostLNStack

_LOG = logging.getLogger(__name__)

_REMEDY = (
    "Load the model again; or pass keep=True to erniem_fast.optimize, which keeps the original weights in memory too."
)

FORMS = tuple(dict.fromkeys([*LINEARS, *GPU_LINEARS]))

Model = TypeVar("Model")
Function = TypeVar("Function", bound=Callable)


def _outside_inference_mode(function: Function) -> Function:
    """Tensors that are made in inference mode could never be trained again."""
    return torch.inference_mode(False)(function)


@dataclass
class _Original:
    """A module that another one has replaced.

    Attributes:
        module: the module; without its weight, unless the weight is kept.
        digest: of a weight that was given up; None if it is kept, or if the other module holds its bits.
    """

    module: nn.Module
    digest: str | None


@_outside_inference_mode
def optimize(model: Model, weights: str | None = None, keep: bool = False) -> Model:
    """Makes encoders faster: models of transformers compute no padding, and weights can change their form; in place.

    XLM-RoBERTa, RoBERTa, CamemBERT and BERT models of transformers run on this package's layers, in inference and in
    training. The object, its parameters and its config stay; the classes of bare models, encoders and layers become
    subclasses of transformers' own. Hidden states are then zeros at padding, except in the first column. Calls that
    these layers do not serve run by transformers' own forward, and a line of the log says why.

    With `weights`, for inference, the linears of the layers are replaced, on a CPU in `bfloat16` and `int8` the word
    table too. All else stays as it is: the pooler and heads, layer norms, softmax and residuals. Modules that have
    hooks or adapters, that were replaced, or that share their weight with others stay too, on a GPU also those whose
    numbers of features are no multiples of 16 in `float8` and of 8 in `int8`; a line of the log names them. The
    parameters of embeddings and layers are frozen, because no gradient flows through these weights.

    Args:
        model: an ERNIE-M model of this package or a model of transformers of the families above, bare or with a head;
            or an object that contains such models: a module, as a `SentenceTransformer` is, or one with a module in an
            attribute, as a pipeline has. With `weights` in float32 on the CPU, for `int8` and `float8` in bfloat16 or
            float16 on an NVIDIA GPU.
        weights: None leaves the weights as they are, also in a form that they were given before.
            `packed` holds them in the layout that the fastest product reads, with the same bits. If products with the
            weights as they are take no longer on this machine, the weights stay as they are, frozen all the same.
            `bfloat16` rounds weights, and the inputs of products, to bfloat16; where oneDNN is faster, the results too.
            `int8` rounds weights to 8 bits with a scale for each row, and inputs of products with a scale for each
            token, so that a sequence's result has the same bits alone and in any batch. On a GPU, which needs compute
            capability 8.0, only the products of the linears do.
            `float8`, on a GPU of compute capability 8.9 or later, does as `int8` in float8_e4m3fn.
        keep: whether to keep rounded weights' originals in memory, for `restore`.

    Returns:
        The same object.

    Raises:
        TypeError: there is no such model in the object. If there are others too, the log says which, and why they stay.
        ValueError: `weights` is unknown, or the device has no products in this form; or the weights have a form
            already, or are in another dtype or on another device than this form takes.
    """
    found = encoders(model)
    before = [(each, type(each)) for root in roots(model) for each in root.modules()]
    for bare in found:
        families.pack(bare)
    for each in holders(model):
        families.pack_head(each)
    try:
        for bare in found:
            _check(bare, weights)
    except ValueError:
        for each, kind in before:
            each.__class__ = kind
        raise
    tell(model)
    if weights is None:
        return model
    uses = _uses(model)
    for bare in found:
        _change_weights(bare, weights, keep, uses)
    if _stay(weights):
        _LOG.warning("The weights stay as they are: this machine multiplies no faster by packed ones.")
        return model
    for root in roots(model):
        leave_file(root)
    return model


def _stay(weights: str) -> bool:
    """Whether weights stay as they are, though frozen: products gain nothing from the layout that the form has."""
    return weights == "packed" and fastest.packing() is None


def _change_weights(bare: nn.Module, weights: str, keep: bool, uses: Counter) -> None:
    """Replaces the modules of a bare model whose weights change their form."""
    bare.originals, bare.trained, bare.encoder.frozen_as = {}, freeze(bare), weights
    if _stay(weights):
        return
    kinds = _kinds(weights, bare.device)
    modules = _replaceable(bare, kinds, uses)
    for name, module in modules.items():
        kind = kinds[type(module)]
        lost = weights != "packed" and not keep
        original = _Original(module, _digest(module.weight) if lost else None)
        bare.set_submodule(name, kind.of(module))
        bare.originals[name] = original
        if lost or weights == "packed":
            module.weight = None
    _forget_calls(bare)


def _forget_calls(bare: nn.Module) -> None:
    """Drops what calls have prepared, which keeps weights in memory."""
    for module in bare.modules():
        for name in ("prepared", "checked"):
            vars(module).pop(name, None)


@_outside_inference_mode
def restore(model: Model) -> Model:
    """Undoes `optimize`: classes and modules are the former ones, with the very bits that weights had; in place.

    Rounded weights do not tell what they were rounded from. Unless `keep=True` kept the originals, they are read again
    from the checkpoint that the model was loaded from, `model.name_or_path`. If the model had other weights when it was
    optimised, as after fine-tuning, the model stays as it is, and an error says so.

    Args:
        model: the object that `optimize` took. A model that is not optimised is left as it is.

    Returns:
        The same object.

    Raises:
        TypeError: there is no model in the object that `optimize` takes.
        ValueError: the original weights are not in the checkpoint; or the model was loaded with int8 weights; or a
            module was replaced, or loaded with other weights, since.
    """
    found = encoders(model)
    for bare in found:
        _restore_weights(bare)
    for bare in filter(families.is_packed, found):
        families.unpack(bare)
    for each in holders(model):
        families.unpack_head(each)
    return model


def _restore_weights(bare: nn.Module) -> None:
    """Puts the modules of a bare model back that `_change_weights` replaced."""
    if not hasattr(bare, "originals"):
        loaded = inference_module(bare)
        if loaded is not None:
            raise ValueError(
                f"The model was loaded with {loaded.weights} weights; load its original checkpoint instead."
            )
        return
    for name in bare.originals:
        module = bare.get_submodule(name)
        if not isinstance(module, InferenceModule):
            raise ValueError(f"{name} was replaced since erniem_fast.optimize; undo that before erniem_fast.restore.")
        if module.was_loaded and module.weights != "packed":
            raise ValueError(
                f"The original weights are lost: load_state_dict has given {name} others since erniem_fast.optimize. "
                f"Load the model again."
            )
    read = _read_again(bare, {name: each.digest for name, each in bare.originals.items() if each.digest is not None})
    for name, original in bare.originals.items():
        module, current = original.module, bare.get_submodule(name)
        if module.weight is None:
            weight = current.weight.clone() if original.digest is None else read[name].to(bare.device)
            module.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(module, nn.Linear):
            module.bias = current.bias
        bare.set_submodule(name, module.train(current.training))
    parameters = dict(bare.named_parameters())
    for name in bare.trained:
        if name in parameters:
            parameters[name].requires_grad_(True)
    del bare.originals, bare.trained, bare.encoder.frozen_as
    _forget_calls(bare)


# --- What can be replaced --------------------------------------------------------------------------------------------


def _kinds(weights: str, device: torch.device) -> dict[type[nn.Module], type[InferenceModule]]:
    """The classes of inference modules for a form of weights on a device, by the classes that they replace."""
    if weights in GPU_LINEARS and (device.type == "cuda" or weights not in LINEARS):
        return {nn.Linear: GPU_LINEARS[weights]}
    table = {nn.Embedding: TABLES[weights]} if weights in TABLES else {}
    return {nn.Linear: linear_kind(weights), **table}


def _check(bare: nn.Module, weights: str | None) -> None:
    if weights not in (None, *FORMS):
        raise ValueError(f"weights={weights!r} is unknown; use None, {', '.join(map(repr, FORMS))}.")
    if weights is None:
        return
    loaded = inference_module(bare)
    present = getattr(bare.encoder, "frozen_as", None) if loaded is None else loaded.weights
    if present is not None:
        raise ValueError(f"The model has {present} weights already; call erniem_fast.restore(model) first.")
    if not isinstance(bare.encoder, PostLNStack):
        kind = type(bare.encoder).__name__
        raise ValueError(
            f"weights={weights!r} is for the encoders of these models, but this one's is of type {kind} now."
        )
    device = bare.device
    if issubclass(_kinds(weights, device)[nn.Linear], ScaledLinear):
        reason = gpu_objection(weights, device)
        if reason is not None:
            raise ValueError(f"weights={weights!r} {reason}")
        wanted, remedy = f"in bfloat16 or float16 on {device}", "dtype=torch.bfloat16, or call model.bfloat16()"
        _check_place(bare, weights, DTYPES, device, wanted, remedy)
        return
    wanted, remedy = "in float32 on the CPU", "dtype=torch.float32, or call model.float().cpu()"
    _check_place(bare, weights, (torch.float32,), torch.device("cpu"), wanted, remedy)
    reason = bfloat16_objection() if weights == "bfloat16" else None
    if reason is not None:
        raise ValueError(f"weights='bfloat16' is not for this machine: {reason}; use weights='int8' or 'packed'.")


def _check_place(
    bare: nn.Module, weights: str, dtypes: tuple[torch.dtype, ...], device: torch.device, wanted: str, remedy: str
) -> None:
    """Refuses a model with a weight in another dtype or on another device."""
    for name, module in places(bare).items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not (weight.dtype in dtypes and weight.device == device):
            raise ValueError(
                f"weights={weights!r} needs a model {wanted}, but {name} is in {weight.dtype} on {weight.device}; "
                f"load the model so, with {remedy}."
            )


def bfloat16_objection() -> str | None:
    """Why this machine does not serve weights in bfloat16; None if it does."""
    if not modes.multiplies_bfloat16():
        return "the CPU lacks AVX512_BF16 and AMX, and would emulate the products, many times slower than in float32"
    has_products = packed.multiplies(torch.bfloat16) or modes.has_onednn_packing()
    return None if has_products else "the native library is not built, and oneDNN is missing or off"


def _uses(model: object) -> Counter:
    """How many modules of an object hold each parameter and each module, by its id."""
    modules = {module for root in roots(model) for module in root.modules()}
    return Counter(id(each) for module in modules for each in (*module._parameters.values(), *module._modules.values()))


def _replaceable(
    bare: nn.Module, kinds: dict[type[nn.Module], type[InferenceModule]], uses: Counter
) -> dict[str, nn.Module]:
    """The modules to replace, by their names in the bare model. The log names those that stay."""
    candidates = places(bare)
    if nn.Embedding not in kinds:
        candidates = {name: each for name, each in candidates.items() if not isinstance(each, nn.Embedding)}
    kind, reasons = kinds[nn.Linear], "hooked, adapted, replaced or shared"
    found = {name: module for name, module in candidates.items() if _is_replaceable(module, uses)}
    if issubclass(kind, ScaledLinear):
        found = {name: module for name, module in found.items() if kind.fits(module)}
        reasons += f", or because of numbers of features that are no multiples of {kind.multiple}"
    left = [name for name in candidates if name not in found]
    if left:
        _LOG.warning("These modules keep their weights, because they are %s: %s", reasons, left)
    return found


def _is_replaceable(module: nn.Module | None, uses: Counter) -> bool:
    if module is None:
        return False
    if modes.is_plain(module, nn.Embedding):
        simple = module.max_norm is None
    else:
        bias = getattr(module, "bias", None)
        simple = modes.is_plain(module, nn.Linear) and (bias is None or bias.dtype == module.weight.dtype)
    return simple and module.weight.numel() > 0 and uses[id(module.weight)] == uses[id(module)] == 1


# --- The weights that were given up ----------------------------------------------------------------------------------


def _digest(weight: Tensor) -> str:
    # Bytes, because NumPy has no bfloat16.
    return hashlib.sha256(weight.detach().contiguous().view(torch.uint8).cpu().numpy().data).hexdigest()


def _read_again(bare: nn.Module, digests: dict[str, str]) -> dict[str, Tensor]:
    """The weights with these digests, by their modules' names, from the bare model's checkpoint.

    Raises:
        ValueError: they are not there.
    """
    if not digests:
        return {}
    path = bare.name_or_path
    if not path:
        raise ValueError(
            f"The original weights are lost, because the model was not loaded from a checkpoint. {_REMEDY}"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # a pooler that is not in the checkpoint is drawn
            kind = families.stock_class(type(bare)) if families.is_packed(bare) else type(bare)
            loaded = kind.from_pretrained(path, dtype=bare.dtype)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"The original weights cannot be read from {path!r}: {error} {_REMEDY}") from error
    parameters = dict(loaded.named_parameters())
    weights = {name: parameters.get(f"{name}.weight") for name in digests}
    changed = [name for name, each in weights.items() if each is None or _digest(each) != digests[name]]
    if changed:
        raise ValueError(
            f"The original weights are lost: {path!r} holds other weights than the model had when it was optimised, "
            f"first of {changed[0]}. {_REMEDY}"
        )
    return {name: each.detach() for name, each in weights.items()}
