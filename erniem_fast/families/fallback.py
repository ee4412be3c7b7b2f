"""When a model runs by transformers' own forward instead of the packed layout, and how users get to know it."""

import logging
import sys
import weakref
from collections.abc import Iterable
from operator import attrgetter

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from .. import modes
from . import stock_class

_LOG = logging.getLogger(__name__)

# Arguments that the packed layout serves, or that change nothing in an encoder.
_SERVED = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    *("output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),  # as collators make them
}

# What a layer holds; the packed layout runs what is inside of them without calling them.
_SKIPPED = ("attention", "attention.self", "attention.output", "intermediate", "output")


def reason(model: PreTrainedModel, arguments: dict[str, object]) -> str | None:
    """Why a call cannot run on the packed layout; None if it can.

    Args:
        model: a packed model.
        arguments: of its forward, by name.
    """
    found = _in_surroundings(arguments) or _in_arguments(model, arguments) or _in_config(model)
    if found is not None:
        return found
    if modes.is_recorded():
        return _in_modules(model)
    checked = vars(model).get("checked")
    if checked is None or not checked.is_for(model):
        checked = vars(model)["checked"] = _Checked(model)
    return checked.reason


class _Checked:
    """The modules of a model that were checked, and what says how long that holds."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._owner = weakref.ref(model)
        modules = [*model.embeddings.modules(), *model.encoder.modules()]
        self._structure = modes.Structure(modules, modules)
        self._linears = [each.__dict__ for each in modules if type(each) is nn.Linear]
        self._layers = [each.__dict__ for each in getattr(model.encoder, "layer", ())]
        self._state = self._read()
        self.reason = _in_modules(model)

    def is_for(self, model: PreTrainedModel) -> bool:
        """Whether it holds still, and not for a model that this one was copied from."""
        return self._owner() is model and self._structure.is_current() and self._read() == self._state

    def _read(self) -> tuple:
        """What is decided by attributes: chunks, and whether weights are distributed."""
        weights = [each["_parameters"].get("weight") for each in self._linears]
        return list(map(type, weights)), [each.get("chunk_size_feed_forward") for each in self._layers]

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies have modules of their own


def tell(model: PreTrainedModel, why: str) -> None:
    """Logs a reason once for each model, and lets transformers record hidden states and attentions of the model."""
    # transformers fills this table, by class, when it makes a model; a class that a model is given later is missing.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)
    told = model.__dict__.setdefault("fallbacks", set())
    if why not in told:
        told.add(why)
        _LOG.warning(
            "%s runs by transformers' own forward, as before erniem_fast.optimize: %s.", type(model).__name__, why
        )


def _in_surroundings(arguments: dict[str, object]) -> str | None:
    if modes.is_exported():
        return "the model is being exported"
    if modes.is_transformed():
        return "torch.func or forward-mode AD transforms the call"
    if not all(modes.has_values(each) for each in arguments.values() if isinstance(each, Tensor)):
        return "its input has no values (fake or meta tensors)"
    return None


def _in_arguments(model: PreTrainedModel, arguments: dict[str, object]) -> str | None:
    for name, value in arguments.items():
        if value is not None and name not in _SERVED and not (name == "output_attentions" and value is False):
            return f"{name} was given"
    if arguments.get("output_attentions", model.config.output_attentions):
        return "output_attentions=True in its config"
    if not _selects_states(arguments.get("output_hidden_states"), len(model.encoder.layer) + 1):
        return "output_hidden_states selects states that there are not"
    ids, embeds = arguments["input_ids"], arguments["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return "not exactly one of input_ids and inputs_embeds was given"
    # No reason names a shape: each batch might have another one, and a line in the log.
    given, dims = (embeds, 3) if ids is None else (ids, 2)
    if given.dim() != dims or given.numel() == 0:
        return f"the input is of dimension {given.dim()}" if given.numel() else "the input is empty"
    mask = arguments["attention_mask"]
    if not isinstance(mask, Tensor | None):
        return f"attention_mask is of type {type(mask).__name__}"
    if mask is None or mask.shape == given.shape[:2]:
        return None
    if mask.dim() == 2:
        return "attention_mask has another shape than the input"
    return f"attention_mask is of dimension {mask.dim()}"


def _selects_states(selected: object, count: int) -> bool:
    """Whether `output_hidden_states` is a bool, or indices of the `count` states."""
    if not isinstance(selected, (list, tuple)):
        return isinstance(selected, bool | None)
    return all(isinstance(index, int) and -count <= index < count for index in selected)


def _in_config(model: PreTrainedModel) -> str | None:
    config = model.config
    if config.is_decoder:
        return "it is a decoder (config.is_decoder)"
    if getattr(config, "is_causal", None):
        return "its attention is causal (config.is_causal)"
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        return f"config.position_embedding_type is {kind!r}"
    return None


def _in_modules(model: PreTrainedModel) -> str | None:
    """A module that would not be called, though it does something else than transformers' module does."""
    encoder, stock = model.encoder, stock_class(type(model)).__module__
    if not modes.is_untouched(encoder, model.encoder_kind):
        return "its encoder was replaced or hooked"
    if not _is_stock(model.embeddings, stock):
        return "its embeddings were replaced or hooked"
    if not _has_plain_dropouts([model.embeddings.dropout]):
        return "the dropout of its embeddings was replaced or hooked"
    for index, layer in enumerate(encoder.layer):
        if not modes.is_untouched(layer, encoder.layer_kind):
            return f"layer {index} was replaced, wrapped or hooked"
        if layer.chunk_size_feed_forward:
            return f"the feed-forward network of layer {index} runs in chunks"
        for name, part in zip(_SKIPPED, _parts(layer), strict=True):
            if not _is_stock(part, stock):
                return f"{name} of layer {index} was replaced or hooked"
        if not _has_plain_dropouts(layer.dropouts()):
            return f"a dropout of layer {index} was replaced or hooked"
        if _has_distributed_weights(layer):
            return f"the weights of layer {index} are distributed (DTensor)"
    if any(map(_chooses_by_row, [*encoder.modules(), *model.embeddings.modules()])):
        return "adapter_names chooses adapters for each row, which its linears do not get"
    return None


def _chooses_by_row(module: nn.Module) -> bool:
    """Whether PEFT tells a module which adapter each row of its input takes."""
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in module._forward_pre_hooks.values())


def _parts(layer: nn.Module) -> tuple[object, ...]:
    """The modules at `_SKIPPED`; None where a replaced one has no such part."""
    try:
        return attrgetter(*_SKIPPED)(layer)
    except AttributeError:
        return (None,) * len(_SKIPPED)


def _is_stock(module: object, stock: str) -> bool:
    """Whether a module's class is of a module of transformers, and nothing is hooked."""
    kind = type(module)
    return kind.__module__ == stock and modes.is_untouched(module, kind)


def _has_plain_dropouts(modules: Iterable[nn.Module | None]) -> bool:
    return all(
        each is None or (type(each) in (nn.Dropout, nn.Identity) and modes.is_untouched(each, type(each)))
        for each in modules
    )


def _has_distributed_weights(layer: nn.Module) -> bool:
    """Whether tensor parallelism has cut the weights: it cuts those of queries and of the feed-forward network."""
    loaded = sys.modules.get("torch.distributed.tensor")  # without it there are none
    linears = (layer.attention.self.query, layer.intermediate.dense)
    return loaded is not None and any(isinstance(getattr(each, "weight", None), loaded.DTensor) for each in linears)
