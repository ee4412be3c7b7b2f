"""Model families of transformers whose encoders `optimize` runs on the packed layout: a file for each.

A model that is taken stays the same object. Its class, and those of its encoder and layers, become subclasses of
transformers' own, with the same names, which can be imported: so pickles and copies work, and `save_pretrained` writes
what it always did. No class of transformers is changed.
"""

from importlib import import_module

from torch import nn

# The modules of transformers.models that hold a family's classes, by the name of the file here.
_FAMILIES = {
    name: f"transformers.models.{name}.modeling_{name}" for name in ("bert", "camembert", "roberta", "xlm_roberta")
}

_PRE_LN = "it normalises before attention and the feed-forward network (pre-LN), not after them"
_BIASED = "its attention has relative positions"

# Why models that look alike are not taken, by their classes' names.
_REFUSED = {
    "XLMRobertaXLModel": _PRE_LN,
    "RobertaPreLayerNormModel": _PRE_LN,
    "MPNetModel": _BIASED,
    "DebertaModel": _BIASED,
    "DebertaV2Model": _BIASED,
}

TAKEN = (
    "XLM-RoBERTa, RoBERTa, CamemBERT and BERT models of transformers whose encoder is transformers' own, and ERNIE-M "
    "models of this package"
)


def packed_class(model: nn.Module) -> type[nn.Module] | None:
    """The class that a bare model of transformers is given; None if there is none for just this class."""
    kind = type(model)
    for family, stock in _FAMILIES.items():
        if kind.__module__ == stock:
            packed = getattr(import_module(f"{__name__}.{family}"), kind.__name__, None)
            is_taken = hasattr(packed, "encoder_kind") and type(model.encoder) is stock_class(packed.encoder_kind)
            return packed if is_taken else None
    return None


def is_packed(model: nn.Module) -> bool:
    """Whether `pack` has given a bare model its class."""
    return _is_ours(model) and hasattr(model, "encoder_kind")


def is_taken(model: nn.Module) -> bool:
    """Whether a bare model has a packed class, or can be given one."""
    return is_packed(model) or packed_class(model) is not None


def pack(model: nn.Module) -> None:
    """Gives a bare model that has a packed class, its encoder and its layers their packed classes."""
    model.__class__ = packed_class(model)
    encoder = model.encoder
    encoder.__class__ = model.encoder_kind
    for layer in encoder.layer:
        if type(layer) is stock_class(encoder.layer_kind):
            layer.__class__ = encoder.layer_kind


def unpack(model: nn.Module) -> None:
    """Gives a bare model and what is inside transformers' classes back, and removes what calls left there."""
    for module in model.modules():
        if _is_ours(module):
            module.__class__ = stock_class(type(module))
            for name in ("prepared", "fallbacks"):
                module.__dict__.pop(name, None)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(f"{__name__}.")


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of transformers that a packed class stands for."""
    return next(each for each in kind.__mro__ if each.__module__.startswith("transformers."))


def refusal(model: nn.Module) -> str | None:
    """Why a model is not taken, if that is known."""
    return _REFUSED.get(type(model).__name__)
