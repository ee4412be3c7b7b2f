"""The weights: a checkpoint of random ones, written once and read by every peer."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import torch
from safetensors.torch import save_file

from erniem_fast import ErnieMConfig, ErnieMModel

SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
BYTES = {"base": 1.2e9, "large": 2.3e9}


@contextlib.contextmanager
def random_checkpoint(size: str, seed: int = 0) -> Iterator[pathlib.Path]:
    """Lend a temporary folder with config.json and random float32 weights of ERNIE-M `size` ("base" or "large").

    Every parameter is random, biases and layer norms too, so that outputs can only agree where each of them is used.

    Raises:
        OSError: there is too little room for temporary files.
    """
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < BYTES[size]:
            raise OSError(
                f"the random weights of --size {size} need {BYTES[size] / 1e9:.1f} GB in {tempfile.gettempdir()}, where"
                f" {free / 1e9:.1f} GB are free; make room, or name another folder in the environment variable TMPDIR"
            )
        torch.manual_seed(seed)
        model = ErnieMModel(ErnieMConfig(**SIZES[size]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), pathlib.Path(folder, "model.safetensors"), metadata={"format": "pt"})
        del model
        yield pathlib.Path(folder)


def read_config(folder: pathlib.Path | str) -> dict:
    """The config of the ERNIE-M checkpoint in `folder`.

    Raises:
        ValueError: there is none.
    """
    path = pathlib.Path(folder, "config.json")
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json; name the folder of an ERNIE-M checkpoint")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "ernie_m":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model; name the folder of an 'ernie_m' one")
    return config
