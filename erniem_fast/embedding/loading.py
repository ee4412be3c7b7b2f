"""Loads a model to embed with, and its tokenizer."""

import torch
from transformers import AutoModel, AutoTokenizer

from ..conversion.files import find_folder
from ..optimize import optimize

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def load(path: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32") -> tuple[object, object]:
    """An optimised model, and its tokenizer unless the model has it: a `SentenceTransformer` where modules.json is.

    Raises:
        TypeError: the model is none that `optimize` takes.
        OSError, ValueError: it cannot be loaded, or cannot have these weights.
        ImportError: it needs sentence-transformers, which is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(map(repr, DTYPES))}.")
    check_device(device)
    options, folder = {"dtype": DTYPES[dtype]}, find_folder(path)
    if not (folder / "modules.json").exists():
        model = AutoModel.from_pretrained(folder, **options).to(device)
        return optimize(model, weights=weights), AutoTokenizer.from_pretrained(folder)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f"{path} is a model of sentence-transformers: pip install sentence-transformers") from error
    model = SentenceTransformer(str(folder), device=device, model_kwargs=options)
    return optimize(model, weights=weights), None


def check_device(device: str) -> None:
    """Refuses a device that is not here, before a model is loaded."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}; use 'cpu'.") from error
