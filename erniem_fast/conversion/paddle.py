"""Checkpoints of PaddleNLP and Baidu: found, read as a state dict of ours, and written.

PaddleNLP's are a `model_state.pdparams` or a `model.safetensors`, or several files and an index, beside a config.json
or, until 2.4, a model_config.json. Baidu's first release is a folder `params` beside an ernie_config.json.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from . import paddle_config, paddle_names
from .files import hub_options, look, look_for_shards
from .pickles import read_pickle, write_pickle
from .variables import read_variables

if TYPE_CHECKING:
    from ..modeling import ErnieMPreTrainedModel

PICKLE, SAFETENSORS, TORCH = "model_state.pdparams", "model.safetensors", "pytorch_model.bin"
CONFIG, BAIDUS_CONFIG = "model_config.json", "ernie_config.json"
VARIABLES, A_VARIABLE = "params", "word_embedding"

# Arguments of `from_pretrained` by which a checkpoint is none of Paddle's.
_OTHER_FORMATS = ("state_dict", "variant", "gguf_file")


class PaddleCheckpoint(NamedTuple):
    """Where the weights of a checkpoint of Paddle are: in which format, and in which files, or in which folder."""

    format: str
    paths: list[str]


def find_checkpoint(source: str | os.PathLike | None, arguments: Mapping[str, Any]) -> PaddleCheckpoint | None:
    """Finds Paddle's weights.

    Args:
        source: a folder, a `.pdparams` file, or a name on the hub.
        arguments: those of `from_pretrained`.

    Returns:
        None if `source` holds weights of PyTorch, or none.

    Raises:
        ValueError: an index names a file that is not there.
    """
    if source is None or any(arguments.get(name) is not None for name in _OTHER_FORMATS):
        return None
    if os.path.isfile(source):
        return PaddleCheckpoint(PICKLE, [os.fspath(source)]) if str(source).endswith(".pdparams") else None
    options = hub_options(arguments)
    if found := _look_for_weights(source, SAFETENSORS, options):
        return PaddleCheckpoint(SAFETENSORS, found) if _holds_paddles_layout(found[0]) else None
    if look(source, TORCH, options) or look(source, f"{TORCH}.index.json", options):
        return None
    if found := _look_for_weights(source, PICKLE, options):
        return PaddleCheckpoint(PICKLE, found)
    for folder in (os.path.join(source, VARIABLES), os.fspath(source)):
        if os.path.isfile(os.path.join(folder, A_VARIABLE)):
            return PaddleCheckpoint(VARIABLES, [folder])
    return None


def read_checkpoint(found: PaddleCheckpoint, answers_questions: bool) -> dict[str, Tensor]:
    """Paddle's weights as a state dict of ours. Memory holds each tensor once, and one of them twice.

    Args:
        found: where they are.
        answers_questions: whether they are for `ErnieMForQuestionAnswering`, whose head has another name in Paddle.

    Raises:
        RefusedPickleError: a file asks for a function that no checkpoint needs.
        ValueError: a file is damaged.
    """
    if found.format == VARIABLES:
        return dict(paddle_names.from_baidu(read_variables(found.paths[0])))
    read = read_pickle if found.format == PICKLE else _read_safetensors
    tensors = {name: tensor for path in found.paths for name, tensor in read(path).items()}
    return dict(paddle_names.from_paddle(_emptied(tensors), list(tensors), answers_questions))


def find_config(source: str | os.PathLike, arguments: Mapping[str, Any]) -> str | None:
    """The absolute path of a config of Paddle or Baidu that has another name than ours; None if there is none."""
    options = hub_options(arguments)
    for name in (CONFIG, BAIDUS_CONFIG):
        if path := look(source, name, options):
            return os.path.abspath(path)
    beside = Path(source).parent / BAIDUS_CONFIG  # of the folder of variables, or of a .pdparams file
    return os.path.abspath(beside) if beside.is_file() else None


def save_as_paddle(model: "ErnieMPreTrainedModel", folder: str | os.PathLike) -> None:
    """Writes a model as PaddleNLP (2.5 and later) reads it: `model_state.pdparams` and `config.json`.

    Args:
        model: an ERNIE-M model with plain weights, all in float32, float16 or bfloat16.
        folder: where; made if it does not exist.

    Raises:
        ValueError: Paddle's ERNIE-M does not have something that this model has.
    """
    fields = model.config.to_diff_dict()
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    always = (*sizes, "intermediate_size", "layer_norm_eps", "act_dropout", "pruned_heads", "pad_token_id")
    fields |= {name: getattr(model.config, name) for name in always}
    fields = paddle_config.to_paddle({**fields, "architectures": [type(model).__name__]})
    tensors = model.state_dict()
    _check_plain(model, tensors)
    os.makedirs(folder, exist_ok=True)
    write_pickle(dict(paddle_names.to_paddle(tensors.items())), os.path.join(folder, PICKLE))
    Path(folder, "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _check_plain(model: "ErnieMPreTrainedModel", tensors: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: a model's tensors are not those that its class begins with, or not all of the same dtype.
    """
    with torch.device("meta"):
        plain = type(model)(model.config).state_dict()
    remedy = "merge adapters into the weights, and call erniem_fast.restore(model) if its weights are rounded"
    for name, tensor in tensors.items():
        if name not in plain:
            raise ValueError(f"The model has a tensor {name!r}, which Paddle's ERNIE-M does not have; {remedy}.")
        if tensor.dtype != model.dtype:
            raise ValueError(
                f"The model is in {model.dtype}, but {name!r} in {tensor.dtype}, which Paddle would not read; {remedy}."
            )


def _look_for_weights(source: str | os.PathLike, name: str, options: Mapping[str, Any]) -> list[str]:
    """The paths of a file of weights, or of the files that it was cut into."""
    path = look(source, name, options)
    return [path] if path else look_for_shards(source, f"{name}.index.json", options)


@contextlib.contextmanager
def _named_if_damaged(path: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path!r} is not a whole .safetensors file ({error}); copy it again.") from error


def _read_safetensors(path: str) -> dict[str, Tensor]:
    with _named_if_damaged(path):
        return load_file(path)


def _holds_paddles_layout(path: str) -> bool:
    with _named_if_damaged(path), safe_open(path, "np") as file:
        return (file.metadata() or {}).get("format") != "pt" and paddle_names.is_paddles(file.keys())


def _emptied(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    while tensors:
        yield tensors.popitem()
