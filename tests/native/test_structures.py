"""The Python tables of csrc/'s structures, held against the C++ by the compiler: names, types, offsets and sizes."""

import ctypes
import pkgutil
import re
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from erniem_fast import native
from erniem_fast.native import bias_gelu, compiler, library
from erniem_fast.native.function import DTYPES, Structure

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")

MODULES = [import_module(f"{native.__name__}.{each.name}") for each in pkgutil.iter_modules(native.__path__)]
STRUCTURES = [
    each
    for module in MODULES
    for value in vars(module).values()
    for each in (value.values() if isinstance(value, dict) else [value])
    if isinstance(each, Structure)
]
POINTED = {
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
    torch.float32: "float",
    torch.int8: "void",
    torch.bfloat16: "void",
    None: "void",
}
NUMBERS = {ctypes.c_int64: "int64_t", ctypes.c_double: "double"}

CPP_OF = {
    name: (source.name, structure)
    for source in compiler.SOURCES.glob("*_cpu.cpp")
    for name, structure in re.findall(r'extern "C" const char\* (\w+)\(const (\w+)\* op', source.read_text())
}
# The parameters of layers, which no function takes by themselves.
CPP_OF |= {"Layer": ("layer_cpu.cpp", "Layer"), "PackedLayer": ("packed_layer_cpu.cpp", "PackedLayer")}


def type_of(table: Structure, name: str, kind: type) -> str:
    if name not in table.tensors:
        return NUMBERS[kind]
    const = "" if name in table.written else "const "
    return f"{const}{POINTED[table.tensors[name][0]]}*"


def assertions(table: Structure) -> str:
    """That the structure has the table's fields and no others, each with its type and at its offset."""
    structure = f"erniem_fast::{CPP_OF[table.name][1]}"
    layout = table.layout
    lines = [f"static_assert(sizeof({structure}) == {ctypes.sizeof(layout)});"]
    for name, kind in table.fields:
        lines.append(f"static_assert(std::is_same_v<decltype({structure}::{name}), {type_of(table, name, kind)}>);")
        lines.append(f"static_assert(offsetof({structure}, {name}) == {getattr(layout, name).offset});")
    return "\n".join(lines)


def complaints(tables: Iterable[Structure], folder: Path, more: str = "") -> str:
    """What the compiler says against the tables: one translation unit a source, one call for all."""
    tables = list(tables)
    units = []
    for source in {CPP_OF[table.name][0] for table in tables}:
        unit = folder / source
        own = (assertions(table) for table in tables if CPP_OF[table.name][0] == source)
        unit.write_text("\n".join([f'#include "{compiler.SOURCES / source}"', "#include <cstddef>", *own, more]))
        units.append(str(unit))
    flags = compiler.cpu_flags(torch.backends.cpu.get_cpu_capability())
    command = [*compiler.cpp(), *flags, "-fsyntax-only", "-w", *units]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_tables_are_the_structures(tmp_path):
    assert {table.name for table in STRUCTURES} == set(CPP_OF)
    assert complaints(STRUCTURES, tmp_path) == ""


def test_numbers_of_dtypes_and_activations(tmp_path):
    dtypes = {"FLOAT32": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
    numbers = {name: DTYPES[dtype] for name, dtype in dtypes.items()}
    numbers |= {name.upper(): number for name, number in bias_gelu.ACTIVATIONS.items()}
    more = "\n".join(f"static_assert(erniem_fast::{name} == {number});" for name, number in numbers.items())
    assert complaints([bias_gelu._FORWARD], tmp_path, more) == ""
    assert "static assertion failed" in complaints(
        [bias_gelu._FORWARD], tmp_path, more.replace("GELU == 0", "GELU == 1")
    )


SIZES = bias_gelu._BACKWARD.sizes.split()
TENSORS = bias_gelu._BACKWARD.tensors
BROKEN = {
    "swapped sizes": {"sizes": " ".join([SIZES[1], SIZES[0], *SIZES[2:]])},
    "a missing size": {"sizes": " ".join(SIZES[:-1])},
    "an added size": {"sizes": " ".join([*SIZES, "another"])},
    "a number of another type": {"sizes": " ".join([*SIZES, "rescale"]), "factors": ""},
    "swapped tensors": {"tensors": dict(sorted(TENSORS.items()))},
    "a missing tensor": {"tensors": {name: TENSORS[name] for name in TENSORS if name != "bias"}},
    "elements of another width": {"tensors": {**TENSORS, "columns": (torch.int32, "tokens")}},
    "a result that is read": {"written": ("grad_x",)},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_found(change, tmp_path):
    assert "error" in complaints([replace(bias_gelu._BACKWARD, **change)], tmp_path)
