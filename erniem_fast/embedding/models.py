"""The encoder inside of the object that a caller has."""

from torch import nn
from transformers import PreTrainedModel

from .. import families
from ..modeling import ErnieMModel
from . import sentence_transformer


def bare_model(model: object) -> PreTrainedModel:
    """The bare encoder of a model, or of what an object holds as `model`.

    Raises:
        TypeError: there is none.
    """
    for kind, remedy in (("CrossEncoder", "score pairs with erniem_fast.score"), ("SparseEncoder", "call its encode")):
        if sentence_transformer.is_kind(model, kind):
            raise TypeError(f"model is of type {kind}, which has no vectors of texts; {remedy}.")
    held = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    found = encoders(held) if isinstance(held, nn.Module) else []
    if len(found) == 1:
        return found[0]
    if not found and isinstance(held, PreTrainedModel):
        return held.base_model
    raise TypeError(
        f"model is of type {type(model).__name__} with {len(found)} encoders; pass a model of transformers or of this "
        f"package, or a SentenceTransformer."
    )


def encoders(module: nn.Module) -> list[nn.Module]:
    """The bare models in a module that this package runs, or can run after `optimize`."""
    return [each for each in module.modules() if isinstance(each, ErnieMModel) or families.is_taken(each)]
