"""Who is found to watch a forward: each by what torch does, so that a change of its private API shows here."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks
from torch.utils.flop_counter import FlopCounterMode

from erniem_fast import modes

SOURCES = Path(modes.__file__).parent
QUESTIONS = ("is_transformed", "is_recorded", "is_exported")


def asked(x):
    """The answers to all questions without an argument, noted by what calls it."""
    answers.append(tuple(getattr(modes, each)() for each in QUESTIONS))
    return x * 2


answers = []


@pytest.fixture(autouse=True)
def no_answers():
    answers.clear()


def test_a_plain_call():
    asked(torch.ones(3))
    assert answers == [(False, False, False)]


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.vmap(asked)(x),
        lambda x: torch.func.grad(lambda x: asked(x).sum())(x),
        lambda x: torch.func.jvp(asked, (x,), (x,)),
        lambda x: torch.func.vmap(torch.func.grad(asked))(x),
    ],
    ids=["vmap", "grad", "jvp", "vmap of grad"],
)
def test_transforms(transform):
    transform(torch.ones(3))
    assert answers == [(True, False, False)]


def test_forward_mode():
    with forward_ad.dual_level():
        asked(forward_ad.make_dual(torch.ones(3), torch.ones(3)))
    assert answers == [(True, False, False)]


def test_a_trace():
    torch.jit.trace(asked, torch.ones(3), check_trace=False)
    assert answers == [(False, True, True)]


class Recorded(nn.Module):
    """Adds to its input the answers, as digits that a graph keeps as constants."""

    def forward(self, x):
        return x + sum(10**place * getattr(modes, each)() for place, each in enumerate(QUESTIONS))


def test_a_compiled_graph():
    compiled = torch.compile(Recorded(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 10  # is_recorded alone


def test_an_exported_graph():
    program = torch.export.export(Recorded(), (torch.zeros(1),), strict=True)
    assert program.module()(torch.zeros(1)).item() == 110  # is_recorded and is_exported


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_vmap_maps_over(wrapped):
    found = []

    def ask(mapped, other):
        found.extend(modes.is_mapped(each) for each in (mapped, other))
        return (mapped * other).sum()

    function = torch.func.grad(ask) if wrapped else ask
    torch.vmap(function, in_dims=(0, None))(torch.ones(2, 3), torch.ones(3))
    assert found == [True, False]
    assert not modes.is_mapped(torch.ones(3))


def test_tensors_without_values():
    with FakeTensorMode():
        assert not modes.has_values(torch.ones(3))
    assert not modes.has_values(torch.ones(3, device="meta"))
    assert modes.has_values(torch.ones(3))


def test_where_memory_may_be_written():
    x = torch.ones(3)
    assert not modes.may_write(x)  # autograd may follow
    with torch.no_grad():
        assert modes.may_write(x)
        assert not modes.may_write(torch.ones(3, device="meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not modes.may_write(x)
        torch.vmap(lambda each: answers.append(modes.may_write(each)) or each)(x)
    assert answers == [False]


def test_what_is_a_plain_call():
    x = torch.ones(2, requires_grad=True)
    assert modes.is_plain_call(x)
    with FlopCounterMode(display=False):
        assert not modes.is_plain_call(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not modes.is_plain_call(x)
    torch.autograd.grad(Asking.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Asking.apply(x), x, torch.ones(2))
    assert answers == [False, True]


class TensorSubclass(torch.Tensor):
    pass


def test_what_more_than_autograd_follows():
    x = torch.ones(2, requires_grad=True)
    assert not modes.is_followed([x, None, 3, nn.Parameter(x)])
    with torch.autocast("cpu", torch.bfloat16):
        assert not modes.is_followed([x])
    for value in (x.detach().as_subclass(TensorSubclass), torch.ones(2, device="meta")):
        assert modes.is_followed([x, value])
    with FlopCounterMode(display=False):
        assert modes.is_followed([x])
    with FakeTensorMode():
        assert modes.is_followed([])
    batched = torch._C._functorch.is_legacy_batchedtensor
    found = torch._vmap_internals._vmap(lambda each: answers.append((batched(each), modes.is_followed([each]))) or each)
    found(torch.ones(2, 2))
    assert answers == [(True, True)]


class Asking(torch.autograd.Function):
    """Notes what its backward is."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        answers.append(modes.is_plain_call(grad))
        return grad


def test_onednn_is_where_torch_has_it():
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    assert modes.has_onednn() == torch.backends.mkldnn.is_available()
    if modes.has_onednn():
        torch.testing.assert_close(modes.onednn_linear(x, weight, bias), F.linear(x, weight, bias))
        with torch.backends.mkldnn.flags(enabled=False):
            assert not modes.has_onednn()


def nothing(*_):
    return None


REGISTRATIONS = {
    "forward": lambda linear: linear.register_forward_hook(nothing),
    "before forward": lambda linear: linear.register_forward_pre_hook(nothing),
    "backward": lambda linear: linear.register_full_backward_hook(nothing),
    "before backward": lambda linear: linear.register_full_backward_pre_hook(nothing),
    "forward of all modules": lambda _: global_hooks.register_module_forward_hook(nothing),
    "before forward of all modules": lambda _: global_hooks.register_module_forward_pre_hook(nothing),
    "backward of all modules": lambda _: global_hooks.register_module_full_backward_hook(nothing),
    "before backward of all modules": lambda _: global_hooks.register_module_full_backward_pre_hook(nothing),
}


@pytest.mark.parametrize("register", REGISTRATIONS.values(), ids=REGISTRATIONS)
def test_hooks(register):
    linear = nn.Linear(2, 3)
    assert modes.is_untouched(linear, nn.Linear)
    handle = register(linear)
    assert not modes.is_untouched(linear, nn.Linear)
    assert not modes.is_plain(linear, nn.Linear)
    handle.remove()
    assert modes.is_untouched(linear, nn.Linear)
    assert modes.is_plain(linear, nn.Linear)


class Subclass(nn.Linear):
    pass


def replaced_forward():
    linear = nn.Linear(2, 3)
    linear.forward = linear.forward
    return linear


def replaced_weight(weight):
    linear = nn.Linear(2, 3)
    del linear.weight
    linear.weight = weight
    return linear


def test_modules_of_other_kinds():
    for module in (Subclass(2, 3), replaced_forward(), nn.Identity()):
        assert not modes.is_untouched(module, nn.Linear)
    for weight in (torch.ones(3, 2).to_sparse(), torch.ones(3, 2).to_mkldnn()):
        assert modes.is_untouched(replaced_weight(weight), nn.Linear)
        assert not modes.is_plain(replaced_weight(weight), nn.Linear)
    assert modes.is_plain(replaced_weight(torch.ones(3, 2)), nn.Linear)
    assert modes.is_plain(nn.Linear(2, 3, bias=False), nn.Linear)


def private_names(source):
    """What a file reads of torch's private modules and attributes."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        dotted = ()
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            dotted = (*node.module.split("."), *(each.name for each in node.names))
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            dotted = tuple(text.split(".")) if re.fullmatch(r"[\w.]+", text) else ()
        if dotted[:1] == ("torch",) and any(each.startswith("_") and not each.startswith("__") for each in dotted[1:]):
            yield ".".join(dotted)


def test_private_torch_api_is_read_in_one_file():
    files = itertools.chain(SOURCES.glob("*.py"), SOURCES.glob("*/*.py"))
    found = {each.name: set(private_names(each)) for each in files}
    assert {name for name, names in found.items() if names} == {"modes.py"}


def test_a_structure_notices_hooks_that_come_and_go():
    watched, other = nn.Linear(2, 2), nn.Linear(2, 2)
    structure = modes.Structure([watched], [watched])
    assert not structure.hooked
    elsewhere = other.register_forward_hook(nothing)
    assert structure.is_current()
    for register in (
        watched.register_forward_hook,
        watched.register_forward_pre_hook,
        watched.register_full_backward_hook,
    ):
        hook = register(nothing)
        assert not structure.is_current()
        hooked = modes.Structure([watched], [watched])
        assert hooked.hooked
        assert hooked.is_current()
        hook.remove()
        assert structure.is_current()
        assert not hooked.is_current()
    elsewhere.remove()
    watched.forward = nothing
    assert not structure.is_current()
