"""Which compiled kernel a launch takes, tried on stand-ins for tensors on a GPU and for Triton's kernels."""

from dataclasses import dataclass

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from erniem_fast.kernels import launch as launches
from erniem_fast.kernels.launch import launch


@dataclass
class Pointer:
    address: int = 4096
    dtype: torch.dtype = torch.bfloat16
    device: int = 0
    is_cuda: bool = True

    def data_ptr(self):
        return self.address

    def get_device(self):
        return self.device


class Kernel(JITFunction):
    """Writes down every launch: whether Triton compiled for it or looked it up, its grid and its arguments."""

    def __init__(self, log):
        def function(x_ptr, rows, y_ptr, factor, COLUMNS: tl.constexpr): ...

        self.fn, self.log = function, log

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.log.append(("Triton's", grid, arguments, options))
            return Compiled(self.log)

        return run


@dataclass
class Compiled:
    log: list

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("compiled", grid, arguments))


FIRST = {"x": Pointer(), "rows": 5, "y": Pointer(8192), "factor": 0.5, "COLUMNS": 64}


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launches, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", None)
    return Kernel([])


def run(kernel, grid=(7,), warps=4, **changes):
    """Launches as `FIRST`, but for some changes; returns who served it."""
    launch(kernel, grid, *{**FIRST, **changes}.values(), num_warps=warps)
    return kernel.log[-1][0]


def test_a_launch_goes_to_triton_once(kernel):
    for _ in range(2):
        run(kernel)
    arguments = tuple(FIRST.values())
    assert kernel.log == [
        ("Triton's", (7,), arguments, {"num_warps": 4}),
        ("compiled", (7, 1, 1), arguments),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 1},
        {"rows": 2**31 - 1},
        {"factor": 1.0},
        {"x": Pointer(1 << 40)},
        {"y": Pointer(8192 + 16)},
        {"grid": (3, 2)},
        {"grid": (3, 2, 5)},
    ],
    ids=str,
)
def test_other_numbers_addresses_and_grids_take_the_same_kernel(kernel, changes):
    run(kernel)
    assert run(kernel, **changes) == "compiled"
    assert kernel.log[-1][1] == (*changes.get("grid", (7,)), 1, 1)[:3]


@pytest.mark.parametrize(
    "changes",
    [
        {"x": Pointer(dtype=torch.float16)},
        {"y": Pointer(8192, dtype=torch.float32)},
        {"y": None},
        {"x": Pointer(device=1)},
        {"COLUMNS": 128},
        {"warps": 8},
    ],
    ids=str,
)
def test_other_kinds_of_arguments_take_another_kernel(kernel, changes):
    run(kernel)
    assert [run(kernel, **changes) for _ in range(2)] == ["Triton's", "compiled"]
    assert run(kernel) == "compiled"


@pytest.mark.parametrize("changes", [{"y": Pointer(8192 + 8)}, {"x": Pointer(4098)}, {"rows": 2**31}], ids=str)
def test_rare_arguments_always_go_to_triton(kernel, changes):
    run(kernel)
    assert [run(kernel, **changes) for _ in range(2)] == ["Triton's"] * 2
    assert run(kernel) == "compiled"


def test_two_kernels_are_told_apart(kernel):
    run(kernel)
    assert run(Kernel(kernel.log)) == "Triton's"


def test_amd_s_kernels_are_left_to_triton(kernel, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [run(kernel) for _ in range(2)] == ["Triton's"] * 2


def test_interpreted_kernels_are_left_to_triton(kernel):
    assert [run(kernel, x=Pointer(is_cuda=False)) for _ in range(2)] == ["Triton's"] * 2
    assert not launches._is_served(object(), Pointer())


def test_kernels_are_specialized_on_no_number(compiling):
    """The numbers that are found are those that a kernel's decorator names, and those that are no integers."""
    code = """
import json
from triton.runtime.jit import JITFunction
from erniem_fast.kernels import add_norm, attention, bias_gelu, launch, quantise
found = {}
for module in (add_norm, attention, bias_gelu, quantise):
    for name, kernel in vars(module).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            places = launch._places(kernel.fn)
            numbers = {kernel.params[place].name for place in places.numbers}
            unspecialized = {each.name for each in kernel.params if each.do_not_specialize}
            constants = [each.num for each in kernel.params if each.is_constexpr]
            found[f"{module.__name__}.{name}"] = [sorted(numbers - unspecialized), constants == places.constants]
print(json.dumps(found))
"""
    found = compiling(code)
    assert len(found) == 11
    for floats, constants_agree in found.values():
        assert set(floats) <= {"eps", "scale", "rescale"}
        assert constants_agree
