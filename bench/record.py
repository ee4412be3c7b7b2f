"""The file of a result: what it begins with, and how it is written and read. Results are dataclasses, kept as JSON."""

import argparse
import dataclasses
import datetime
import json
import pathlib
import types
import typing

from bench import RESULTS
from bench.machine import Machine, available_cores, describe

RENAMED = {"operations_per_second": "flops_per_second"}  # fields of older files


@dataclasses.dataclass
class Settings:
    """What a run of the model was asked for."""

    model: str
    dtype: str
    device: str
    threads: int


@dataclasses.dataclass
class Run:
    """What every result of the model begins with."""

    name: str
    date: str
    machine: Machine
    settings: Settings


def begin(name: str, arguments: argparse.Namespace) -> Run:
    """The head of a result.

    Args:
        name: of what is measured.
        arguments: what `add_run_options` asks for.
    """
    settings = Settings(
        model=arguments.model.resolve().name if arguments.model else f"{arguments.size}, random weights",
        dtype=arguments.dtype,
        device=arguments.device,
        threads=arguments.threads or available_cores(),
    )
    return Run(name, now(), describe(arguments.device), settings)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def stem_of(run: Run, output: pathlib.Path | None) -> pathlib.Path:
    """The path of a result of the model, without an ending, in the folder `output` or that of its machine."""
    name = f"{run.name}-{run.settings.model.partition(',')[0]}-{run.settings.dtype}"
    return (output or RESULTS / run.machine.slug) / name


def write(result, text: str, stem: pathlib.Path) -> None:
    """Print the report `text`, and keep both."""
    keep(result, text, stem)
    print(f"\n{text}\n{stem}.* hold this, all that was measured and, where matplotlib is installed, pictures")


def keep(result, text: str, stem: pathlib.Path) -> None:
    """Write the report `text` as Markdown beside the JSON of `result`, a dataclass."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    encoded = json.dumps(dataclasses.asdict(result), indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(encoded + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


def read(kind: type, path: pathlib.Path):
    """The result in the JSON file `path`, of the dataclass `kind`."""
    return parse(kind, json.loads(path.read_text(encoding="utf-8")))


def parse(kind, value):
    """What `json.loads` returned, as `kind`: a dataclass, a list or dict of such, or one of these or None."""
    if isinstance(kind, types.UnionType):
        return None if value is None else parse(kind.__args__[0], value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        named = {RENAMED.get(name, name): each for name, each in value.items()}
        return kind(**{name: parse(hints[name], each) for name, each in named.items()})
    if typing.get_origin(kind) is list:
        return [parse(kind.__args__[0], each) for each in value]
    if typing.get_origin(kind) is dict:
        return {name: parse(kind.__args__[1], each) for name, each in value.items()}
    return value
