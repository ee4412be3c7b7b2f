"""What is inside an object that a user hands over: the encoders that `optimize` takes, and the models around them."""

from torch import nn
from transformers import PreTrainedModel

from . import families
from .modeling import ErnieMModel


def roots(model: object) -> list[nn.Module]:
    """The modules of an object: itself, or those in its attributes, as in a pipeline of transformers."""
    held = [model] if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).values()
    return [each for each in held if isinstance(each, nn.Module)]


def encoders(model: object) -> list[nn.Module]:
    """The bare models in an object that are taken.

    Raises:
        TypeError: there are none.
    """
    modules = list(dict.fromkeys(module for root in roots(model) for module in root.modules()))
    found = [module for module in modules if is_taken(module)]
    if not found:
        seen = {type(each).__name__: families.refusal(each) for each in modules if isinstance(each, PreTrainedModel)}
        contents = f"contains {', '.join(seen)}" if seen else "contains no model of transformers"
        reasons = "".join(f" {name} is not taken because {why}." for name, why in seen.items() if why)
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}, which {contents}.{reasons} "
            f"erniem_fast.optimize and restore take {families.TAKEN}, not subclasses of these, with or without a head "
            f"and inside of other objects. Pass one of these, or an object whose attributes hold one."
        )
    return found


def is_taken(module: nn.Module) -> bool:
    """Whether a module is a bare model that `optimize` takes, or has taken."""
    return isinstance(module, ErnieMModel) or families.is_taken(module)


def holders(model: object) -> list[PreTrainedModel]:
    """The models of transformers' classes in an object that hold an encoder, bare and with heads, outermost first."""
    inside = [module for root in roots(model) for module in root.modules() if isinstance(module, PreTrainedModel)]
    return [each for each in inside if any(map(is_taken, each.modules()))]
