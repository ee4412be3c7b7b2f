"""Loads a model to embed with, and its tokenizer."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoTokenizer

from ..optimize import optimize

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
OTHER_FORMATS = ["onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot"]  # of models on the hub


def load(path: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32") -> tuple[object, object]:
    """An optimised model, and its tokenizer unless the model has it: a `SentenceTransformer` where modules.json is.

    Raises:
        TypeError: the model is none that `optimize` takes.
        OSError, ValueError: it cannot be loaded, or cannot have these weights.
        ImportError: it needs sentence-transformers, which is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(map(repr, DTYPES))}.")
    _check_device(device)
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


def find_folder(path: str) -> Path:
    """A folder that is there, or that of a model on the hub, which is downloaded.

    Raises:
        OSError: there is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        raise OSError(f"There is no folder {path!r}, and no such model on the hub can be had: {error}") from error


def _check_device(device: str) -> None:
    """Refuses a device that is not here, before a model is loaded."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}; use 'cpu'.") from error
