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


def is_packed(model: nn.Module) -> bool:
    """Whether `pack` has given a bare model its class."""
    return _is_ours(model) and hasattr(model, "encoder_kind")


def is_taken(model: nn.Module) -> bool:
    """Whether a bare model has a packed class, or can be given one."""
    return is_packed(model) or (hasattr(_packed_class(model), "encoder_kind") and refusal(model) is None)


def pack(model: nn.Module) -> None:
    """Gives a bare model that is taken, its encoder and its layers their packed classes, where these are missing."""
    for module in (model, model.encoder, *getattr(model.encoder, "layer", ())):
        module.__class__ = _packed_class(module) or type(module)


def _packed_class(module: nn.Module) -> type[nn.Module] | None:
    """The packed class for a module of transformers; None if there is none for just its class."""
    kind = type(module)
    for family, stock in _FAMILIES.items():
        if kind.__module__ == stock:
            return getattr(import_module(f"{__name__}.{family}"), kind.__name__, None)
    return None


def pack_head(model: nn.Module) -> None:
    """Gives a model with a head its packed class, if there is one for just its class."""
    packed = _packed_class(model)
    if packed is not None and not hasattr(packed, "encoder_kind"):
        model.__class__ = packed


def unpack_head(model: nn.Module) -> None:
    """Gives a model with a head transformers' class back."""
    if _is_ours(model):
        model.__class__ = stock_class(type(model))


def unpack(model: nn.Module) -> None:
    """Gives a bare model and what is inside transformers' classes back, and removes what calls left there."""
    for module in model.modules():
        if _is_ours(module):
            module.__class__ = stock_class(type(module))
            for name in ("prepared", "checked", "fallbacks", "_graphs"):
                module.__dict__.pop(name, None)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(f"{__name__}.")


def is_of_family(model: nn.Module) -> bool:
    """Whether a model's class is transformers' own of a family that is taken, or the packed one in its place."""
    return _is_ours(model) or type(model).__module__ in _FAMILIES.values()


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of transformers that a packed class stands for."""
    return next(each for each in kind.__mro__ if each.__module__.startswith("transformers."))


def refusal(model: nn.Module) -> str | None:
    """Why a model of transformers is not taken, if that is known."""
    kind = type(model).__name__
    if kind in _REFUSED:
        return _REFUSED[kind]
    if kind.startswith("FSDP"):  # `fully_shard` gives modules classes of its own
        return "FSDP has sharded it, and sharded layers run by transformers' own forward"
    packed = _packed_class(model)
    if not hasattr(packed, "encoder_kind"):
        return None
    if type(model.encoder) is not stock_class(packed.encoder_kind):
        return f"its encoder is of type {type(model.encoder).__name__}, not transformers' own"
    if "forward" in vars(model):
        return "its forward was replaced on the object, which would not call another class's; optimize it before that"
    return None
