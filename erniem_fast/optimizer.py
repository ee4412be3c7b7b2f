"""AdamW as ERNIE-M is fine-tuned with it: rates that fall from layer to layer, and no decay of biases and norms."""

import re
from collections.abc import Iterable

import torch
from torch import nn

_LAYER = re.compile(r"(?:^|\.)encoder\.layers?\.(\d+)\.")


def create_optimizer(
    model: nn.Module,
    lr: float = 5e-5,
    *,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained, with layer-wise decay of the rate.

    With d = `layer_decay`, the rate is `lr` for pooler and head, `lr` · d^(L - i) for layer i of L, counted from 0, and
    `lr` · d^(L + 1) for the embeddings. ERNIE-M's paper fine-tunes with d = 0.8, or 0.9 for its large model on MLQA.
    Biases and norms, which have one dimension, get no weight decay.

    Args:
        model: ours, or one of transformers whose layers are `encoder.layer`.
        lr: the largest rate.
        layer_decay: factor of the rate from a layer to the one before it, above 0; 1 for the same rate everywhere.
        weight_decay: of all parameters with two dimensions or more.
        betas, eps: as in `torch.optim.AdamW`.

    Returns:
        The optimizer; each group has the `name` of its place and its rate.

    Raises:
        ValueError: `layer_decay` is not above 0, or no parameter is trained.
    """
    if not layer_decay > 0:
        raise ValueError(f"layer_decay={layer_decay} must be above 0; use 1 for the same rate in all layers.")
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    if not named:
        raise ValueError("No parameter of the model requires gradients; nothing can be trained.")
    layers = _number_of_layers(name for name, _ in model.named_parameters())
    groups: dict[tuple[str, bool], dict[str, object]] = {}
    for name, parameter in named:
        place, depth = _place(name, layers)
        decays = parameter.dim() > 1
        rates = {"lr": lr * layer_decay**depth, "weight_decay": weight_decay if decays else 0.0}
        group = groups.setdefault((place, decays), {"name": place, "params": [], **rates})
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=lr, betas=betas, eps=eps)


def _number_of_layers(names: Iterable[str]) -> int:
    return max((int(found[1]) + 1 for found in map(_LAYER.search, names) if found), default=0)


def _place(name: str, layers: int) -> tuple[str, int]:
    """Where a parameter stands, and the power of the decay there. A table that the head shares is an embedding."""
    if found := _LAYER.search(name):
        return f"layer {found[1]}", layers - int(found[1])
    return ("embeddings", layers + 1) if "embeddings." in name else ("head", 0)
