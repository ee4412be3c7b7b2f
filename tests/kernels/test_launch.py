"""Which compiled kernel a launch takes, tried on stand-ins for tensors on a GPU and for Triton's kernels."""

from dataclasses import dataclass

import pytest
import torch
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


@dataclass
class Parameter:
    """As Triton reads it off a kernel whose decorator forbids to specialize on `rows`."""

    num: int
    name: str

    @property
    def is_constexpr(self):
        return self.name.isupper()

    @property
    def do_not_specialize(self):
        return self.name == "rows"


class Kernel(JITFunction):
    """Writes down every launch: whether Triton compiled for it or looked it up, its grid and its arguments."""

    def __init__(self, log):
        self.fn, self.log = lambda: None, log
        names = ["x_ptr", "rows", "y_ptr", "factor", "COLUMNS"]
        self.params = [Parameter(*each) for each in enumerate(names)]

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
    monkeypatch.setattr(launches, "_places", {})
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


@pytest.mark.parametrize(
    "changes",
    [{"y": Pointer(8192 + 8)}, {"x": Pointer(4098)}, {"rows": 2**31}, {"factor": 1}],
    ids=str,
)
def test_rare_arguments_always_go_to_triton(kernel, changes):
    """For a factor of 1 as an integer, Triton compiles a kernel that knows no other."""
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


def test_the_kinds_of_every_kernel_s_arguments(compiling):
    code = """
import json
from triton.runtime.jit import JITFunction
from erniem_fast.kernels import add_norm, attention, bias_gelu, launch, quantise
found = {}
for module in (add_norm, attention, bias_gelu, quantise):
    for name, kernel in vars(module).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            places = launch._find_places(kernel)
            found[f"{module.__name__}.{name}"] = [[kernel.params[i].name for i in kind] for kind in places]
print(json.dumps(found))
"""
    found = compiling(code)
    assert len(found) == 11
    for pointers, integers, floats, constants in found.values():
        assert set(integers) <= {"tokens", "rows_per_program", "threshold", "blocks", "count"}
        assert set(floats) <= {"eps", "scale", "rescale"}
        assert all(name.endswith("_ptr") for name in pointers)
        assert all(name.isupper() for name in constants)


def test_triton_s_own_kernels_are_launched_with_its_arguments(compiling):
    """On a driver that launches nothing, with tensors whose kernels Triton tells apart, and numbers likewise."""
    code = """
import json
import torch
from bench.kernels.compiling import CompilingDriver
from triton.runtime import driver
from erniem_fast.batch import TokenBatch
from erniem_fast.kernels import bias_gelu, launch
from erniem_fast.kernels.device import Device

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        numbers = [each for each in arguments[9:] if not isinstance(each, torch.Tensor)]
        launches.append([id(self), arguments[:3], numbers])

class Utilities:
    def load_binary(self, *_):
        return object(), 0, 0, 0, 1024

    def unload_module(self, _):
        pass

    def get_device_properties(self, _):
        return {"max_shared_mem": 2**20}

class Driver(CompilingDriver):
    launcher_cls, utils = Launcher, Utilities()

def run():
    for shift, p, rows in ((0, 0, 5), (1, 0, 5), (0, 0.1, 5), (0, 0.6, 5), (0, 0.1, 1)):
        x = memory[shift : shift + rows * 64].view(rows, 64)
        batch = TokenBatch.from_cu_seqlens(torch.tensor([0, rows]), rows, rows)
        bias_gelu.forward(x, memory[:64], "gelu", batch.dropout(p, torch.ones(1, dtype=torch.int64)) if p else None)
    kept, launches[:] = launches[:], []
    return kept

driver.set_active(Driver("sm_90"))
bias_gelu.describe = lambda _: Device("sm_90", 132, 32)
memory, launches, served = torch.zeros(5 * 64 + 1), [], launch._is_served
by_triton = run()
launch._is_served = lambda *_: True
first, again, known = run(), run(), len(launch._compiled)
launch._is_served = served
kernels = len({each[0] for each in by_triton})
print(json.dumps([len(by_triton), kernels, first == by_triton, again == by_triton, known]))
"""
    assert compiling(code) == [5, 4, True, True, 2]
