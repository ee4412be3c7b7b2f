"""What is inside an object that a user hands over: the encoders that `optimize` takes, and the models around them."""

import logging

from torch import nn
from transformers import PreTrainedModel

from . import families
from .modeling import ErnieMModel

_LOG = logging.getLogger(__name__)


def roots(model: object) -> list[nn.Module]:
    """The modules of an object: itself, or those in its attributes, as in a pipeline of transformers."""
    held = [model] if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).values()
    return [each for each in held if isinstance(each, nn.Module)]


def encoders(model: object) -> list[nn.Module]:
    """The bare models in an object that are taken.

    Raises:
        TypeError: there are none.
    """
    found = [module for module in _modules(model) if is_taken(module)]
    if not found:
        seen = _left(model)
        kinds = [type(each).__name__ for each in roots(model)]
        contents = ", ".join(seen) or f"no model of transformers{f', only {kinds}' if kinds else ''}"
        reasons = "".join(f" {name} is not taken because {why}." for name, why in seen.items() if why)
        place = "which contains" if isinstance(model, nn.Module) else "whose attributes hold"
        raise TypeError(
            f"model is of type {type(model).__module__}.{type(model).__qualname__}, {place} {contents}.{reasons} "
            f"erniem_fast.optimize and restore take {families.TAKEN}, not subclasses of these, with or without a head "
            f"and inside of other objects. Pass one of these itself, or an object whose attributes hold one."
        )
    return found


def tell(model: object) -> None:
    """Logs which models in an object are taken, and if others are not, which and why, in one line."""
    taken = ", ".join(type(each).__name__ for each in encoders(model))
    left = [f"{name} ({why or 'has other layers'})" for name, why in _left(model).items()]
    if left:
        _LOG.warning("erniem_fast.optimize has taken %s, and left as they are: %s.", taken, ", ".join(left))
    else:
        _LOG.info("erniem_fast.optimize has taken %s.", taken)


def _modules(model: object) -> list[nn.Module]:
    """All modules in an object, each once."""
    return list(dict.fromkeys(module for root in roots(model) for module in root.modules()))


def _left(model: object) -> dict[str, str | None]:
    """The models of transformers in an object that are not taken and hold none that is, and why, if that is known.

    Of models inside each other, it is the innermost.
    """
    models = [each for each in _modules(model) if isinstance(each, PreTrainedModel)]
    others = [each for each in models if not any(map(is_taken, each.modules()))]
    outer = [each for each in others if any(inner in others for inner in list(each.modules())[1:])]
    return {type(each).__name__: families.refusal(each) for each in others if each not in outer}


def is_taken(module: nn.Module) -> bool:
    """Whether a module is a bare model that `optimize` takes, or has taken."""
    return isinstance(module, ErnieMModel) or families.is_taken(module)


def holders(model: object) -> list[PreTrainedModel]:
    """The models of transformers' classes in an object that hold an encoder, bare and with heads, outermost first."""
    inside = [module for root in roots(model) for module in root.modules() if isinstance(module, PreTrainedModel)]
    return [each for each in inside if any(map(is_taken, each.modules()))]
