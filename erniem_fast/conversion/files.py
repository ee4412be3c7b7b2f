"""Files of a checkpoint, in a folder or on the hub."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

# The arguments of `from_pretrained` that say where the files of a checkpoint are.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
OTHER_FORMATS = ["onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot"]  # of models on the hub


def find_folder(source: str) -> Path:
    """A folder that is there, or that of a model on the hub, which is downloaded.

    Raises:
        OSError: there is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        raise OSError(f"There is no folder {source!r}, and no such model on the hub can be had: {error}") from error


def hub_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where files are, if they say anything."""
    return {name: arguments[name] for name in HUB_OPTIONS if arguments.get(name) is not None}


def look(source: str | os.PathLike, name: str, options: Mapping[str, Any]) -> str | None:
    """The path of a file of a checkpoint, downloaded if it is on the hub; None if the checkpoint does not have it."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )


def look_for_shards(source: str | os.PathLike, index: str, options: Mapping[str, Any]) -> list[str]:
    """The paths of the files that an index file names, sorted; none if there is no such index.

    Raises:
        ValueError: the index is none, or names a file that is not there.
    """
    path = look(source, index, options)
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path!r} is not an index of a checkpoint's files ({error}); copy it again.") from error
    paths = [look(source, name, options) if os.path.basename(name) == name else None for name in names]
    if None in paths:
        raise ValueError(f"{path!r} names {names[paths.index(None)]!r}, which {str(source)!r} does not have; copy it.")
    return paths
