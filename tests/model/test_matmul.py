"""The products in float32 on the CPU: right by every library, forward and backward, and the choice of one."""

import json
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from erniem_fast.linears import project, project_side_by_side
from erniem_fast.matmul import KINDS, dispatch, fastest, library_of, linear
from erniem_fast.matmul.libraries import LIBRARIES, available
from erniem_fast.native import library
from tests.products import every_library, products_by

needs_onednn = pytest.mark.skipif("onednn" not in available(), reason="there is no oneDNN here")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_product(result, x, weight, bias=None):
    """`F.linear` in float64, to within the bound of sums in any order: each term is rounded once for every addition."""
    x, weight, bias = (None if each is None else each.detach().double() for each in (x, weight, bias))
    bound = EPS * (x.shape[1] + 1) * F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert result.shape == bound.shape
    assert ((result.double() - F.linear(x, weight, bias)).abs() <= bound).all()  # false for NaN


@every_library
@pytest.mark.parametrize("tokens", [1, 3, 4, 15, 17, 20, 21, 52, 64, 65, 68, 69, 132, 133, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 24), (768, 97), (31, 5), (7, 1), (96, 1031)])
def test_every_library_beside_float64(name, tokens, inputs, outputs, poisoned_memory):
    """Into memory of its own, and between columns that stay as they are; forward and as both gradients' products."""
    x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    multiply, grad = LIBRARIES[name], torch.randn(tokens, outputs)
    around = torch.full((tokens, outputs + 6), torch.nan)
    assert_product(multiply(x, weight, bias, None), x, weight, bias)
    assert_product(multiply(x, weight, None, around[:, 3:-3]), x, weight)
    assert_product(around[:, 3:-3], x, weight)
    assert around[:, :3].isnan().all()
    assert around[:, -3:].isnan().all()
    for operands in ((grad, weight.t()), (grad.t(), x.t())):
        result = multiply(*operands, None, None)
        assert result.is_contiguous()
        assert_product(result, *operands)


@every_library
def test_operands_of_any_strides(name):
    """Expanded, with gaps, and off every alignment."""
    x, weight = torch.randn(9, 64), torch.randn(12, 64)
    memory = torch.randn(12 * 64 + 1)
    operands = {
        "expanded": (x[:1].expand(9, 64), weight[:1].expand(12, 64)),
        "gaps": (x[:, ::2], weight[:, ::2]),
        "rows apart": (x[:, :32], weight[:, 32:]),
        "unaligned": (memory[1 : 9 * 64 + 1].view(9, 64), memory[1:].view(12, 64)),
    }
    for given in operands.values():
        assert_product(LIBRARIES[name](*given, None, None), *given)


@every_library
@pytest.mark.parametrize("tokens", [1, 7, 40, 150])
def test_gradients_beside_float64(name, tokens):
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((tokens, 48), (36, 48), (36,)))
    grad = torch.randn(tokens, 36)
    with products_by(name) as calls:
        linear(x, weight, bias).backward(grad)
    assert calls == ([] if name == "torch" else [(tokens, 36), (tokens, 48), (36, 48)])
    assert_product(x.grad, grad, weight.t())
    assert_product(weight.grad, grad.t(), x.t())
    assert_product(bias.grad[:, None], grad.t(), torch.ones(1, tokens))
    assert weight.grad.is_contiguous()


@needs_onednn
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_library_of_its_own(kind, monkeypatch):
    x, weight = torch.randn(7, 48, requires_grad=True), torch.randn(36, 48, requires_grad=True)
    with products_by("onednn") as calls:
        monkeypatch.setattr(dispatch, "fastest", lambda each, tokens: "onednn" if each == kind else "torch")
        linear(x, weight).sum().backward()
    assert calls == [{"forward": (7, 36), "grad_x": (7, 48), "grad_weight": (36, 48)}[kind]]


def saved_by(multiply, *operands):
    """The shapes of what autograd saves, in order."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: shapes.append(each.shape) or each, lambda each: each):
        multiply(*operands)
    return shapes


@every_library
@pytest.mark.parametrize("needs", range(1, 8))
def test_it_saves_what_pytorch_saves_and_gives_the_gradients_that_are_needed(name, needs):
    operands = torch.randn(6, 10), torch.randn(4, 10), torch.randn(4)
    for place, each in enumerate(operands):
        each.requires_grad_(bool(needs >> place & 1))
    with products_by(name):
        assert saved_by(linear, *operands) == saved_by(F.linear, *operands)
        linear(*operands).sum().backward()
    assert [each.grad is not None for each in operands] == [each.requires_grad for each in operands]


@every_library
def test_a_graph_is_kept_checkpointed_and_differentiated_twice(name):
    x, weight, bias = (torch.randn(*shape, dtype=torch.float32, requires_grad=True) for shape in ((5, 8), (8, 8), (8,)))

    def tied(x):  # a weight used twice
        return linear(linear(x, weight, bias), weight, bias).pow(2).sum()

    def expected(x):
        return F.linear(F.linear(x, weight, bias), weight, bias).pow(2).sum()

    def gradients(function, **options):
        return torch.autograd.grad(function, (x, weight, bias), **options)

    bound = {"rtol": 1e-4, "atol": 1e-3}
    with products_by(name) as calls:
        out = tied(x)
        first, again = gradients(out, retain_graph=True), gradients(out)
        assert all(map(torch.equal, first, again))
        torch.testing.assert_close(first, gradients(expected(x)), **bound)
        for reentrant in (True, False):
            torch.testing.assert_close(gradients_of(checkpoint(tied, x, use_reentrant=reentrant), x, weight), first[:2])
        once = [each.square().sum() for each in gradients(tied(x), create_graph=True)]
        twice = gradients(sum(once))
        assert calls
    wanted = gradients(sum(each.square().sum() for each in gradients(expected(x), create_graph=True)))
    for found, other in zip(twice, wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def gradients_of(loss, *leaves):
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return tuple(leaf.grad for leaf in leaves)


@every_library
def test_many_gradients_at_once(name):
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    grads = torch.randn(3, 5, 6)
    with products_by(name):
        out = linear(x, weight)
        together = torch.autograd.grad(out, (x, weight), grads, is_grads_batched=True, retain_graph=True)
        apart = [torch.autograd.grad(out, (x, weight), each, retain_graph=True) for each in grads]
    for found, expected in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


@every_library
def test_the_encoder_s_products_are_by_the_chosen_library(name):
    module, x = nn.Linear(32, 24), torch.randn(7, 32)
    with products_by(name) as calls, torch.no_grad():
        (whole, *rest), apart = project(module, x), project(module, x, into="add_norm")
        joined = project_side_by_side([module, module], x)
    assert calls == [(7, 24)] * 4
    assert rest == [None, True]
    for found in (whole, apart.value, joined[:, :24], joined[:, 24:]):
        assert_product(found, x, module.weight, module.bias)


def without_kernels(multiply, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    multiply()


def verified(multiply, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
    multiply()


def counted(multiply, monkeypatch):
    with FlopCounterMode(display=False) as counter:
        multiply()
    assert counter.get_total_flops() == 2 * 7 * 32 * 8


def with_autocast(multiply, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        multiply()


def with_fake_tensors(multiply, monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert multiply(torch.empty(7, 32)).shape == (7, 8)


def in_bfloat16_by_request(multiply, monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        multiply()
    finally:
        torch.set_float32_matmul_precision(before)


OTHERWISE = {
    "no kernels": without_kernels,
    "verified": verified,
    "counted": counted,
    "autocast": with_autocast,
    "fake": with_fake_tensors,
    "bfloat16 by request": in_bfloat16_by_request,
    "bfloat16": lambda multiply, _: multiply(dtype=torch.bfloat16),
    "float64": lambda multiply, _: multiply(dtype=torch.float64),
    "no tokens": lambda multiply, _: multiply(torch.ones(0, 32)),
    "mapped": lambda multiply, _: torch.vmap(lambda x: multiply(x))(torch.ones(2, 7, 32)),
    "compiled": lambda multiply, _: torch.compile(multiply, backend="eager")(),
}


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("other", OTHERWISE.values(), ids=OTHERWISE)
def test_pytorch_s_own_products_elsewhere(other, train, monkeypatch):
    weight = torch.randn(8, 32, requires_grad=train)

    def multiply(x=None, dtype=torch.float32):
        x = torch.ones(7, 32) if x is None else x
        return linear(x.to(dtype), weight.to(dtype))

    with torch.set_grad_enabled(train), products_by("native") as calls:
        other(multiply, monkeypatch)
    assert calls == []


def test_operands_that_do_not_fit_are_pytorch_s_to_refuse():
    for train in (False, True):
        with products_by("native"), torch.set_grad_enabled(train), pytest.raises(RuntimeError, match="shapes"):
            linear(torch.ones(7, 32), torch.ones(8, 31, requires_grad=True))


# The choice.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has measured nothing; yields the file's future path."""
    native = library.path("cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fastest, "_known", {})
    yield fastest._file
    assert library.path("cpu") == native  # remembered


@pytest.fixture
def measured(cache, monkeypatch):
    """The kinds that were measured; oneDNN wins all for up to 16 tokens, and by less than counts for more."""
    kinds = []

    def measure(kind, sizes):
        kinds.append(kind)
        gain = 0.5 if sizes.start <= 16 else 0.96
        return {name: gain if name == "onednn" else 1.0 for name in fastest._candidates(kind)}, True

    monkeypatch.setattr(fastest, "_measure", measure)
    return kinds


def restart():
    fastest._known.clear()


@needs_onednn
def test_the_choice_is_measured_once_and_kept(measured, cache):
    for _ in range(2):
        assert [fastest.fastest("grad_x", tokens) for tokens in (4, 16)] == ["onednn"] * 2
        assert [fastest.fastest("grad_x", tokens) for tokens in (17, 10**6)] == ["torch"] * 2
        assert measured == ["grad_x"] * 3
        restart()  # and read from the cache
    assert fastest.fastest("forward", 4) == "onednn"
    assert measured == ["grad_x"] * 3 + ["forward"]
    assert len(json.loads(cache().read_text())["seconds"]) == 4


@needs_onednn
def test_each_number_of_threads_has_a_choice_of_its_own(measured, cache):
    threads, files = torch.get_num_threads(), set()
    try:
        for each in (threads, threads + 1, threads):
            torch.set_num_threads(each)
            fastest.fastest("forward", 4)
            files.add(cache())
    finally:
        torch.set_num_threads(threads)
    assert measured == ["forward"] * 2
    assert len(files) == 2


@needs_onednn
def test_processes_that_measure_at_the_same_time_keep_each_other_s_times(measured, cache):
    fastest.fastest("forward", 4)
    own = dict(fastest._known)
    restart()
    fastest.fastest("grad_x", 4)  # by another process
    fastest._known.update(own)
    fastest.fastest("grad_weight", 4)
    assert set(json.loads(cache().read_text())["seconds"]) == {f"{kind} 4-16" for kind in KINDS}


def damage(content):
    return content[:-10]


def of_another_machine(content):
    return content.replace(fastest._processor(), "Another processor")


def without_a_library(content):
    changed = json.loads(content)
    for seconds in changed["seconds"].values():
        del seconds["onednn"]
    return json.dumps(changed)


def with_times_that_are_none(content):
    return content.replace("0.5", "NaN")


def of_another_form(content):
    return "[1, 2]"


@needs_onednn
@pytest.mark.parametrize(
    "change", [damage, of_another_machine, without_a_library, with_times_that_are_none, of_another_form]
)
def test_a_cache_that_does_not_serve_is_ignored_and_replaced(change, measured, cache):
    fastest.fastest("forward", 4)
    content = cache().read_text()
    cache().write_text(change(content))
    restart()
    assert fastest.fastest("forward", 4) == "onednn"
    assert measured == ["forward"] * 2
    assert cache().read_text() == content


@needs_onednn
def test_a_cache_that_others_may_write_to_is_not_read(measured, cache):
    fastest.fastest("forward", 4)
    os.chmod(cache(), 0o666)
    restart()
    fastest.fastest("forward", 4)
    assert measured == ["forward"] * 2


@needs_onednn
def test_a_cache_that_cannot_be_written_leaves_the_choice(measured, cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [fastest.fastest("forward", 4) for _ in range(2)] == ["onednn"] * 2
    assert measured == ["forward"]


@pytest.fixture
def clock(monkeypatch):
    """Times of products, by library: first that of a preparation, then a second each, unless `slow` has others."""
    slow, calls = [], Counter()

    def time(name, kind, operands, weight):
        key = name, *operands[0].shape
        calls[key] += 1
        return 13.0 if calls[key] == 1 else slow.pop() if slow else 1.0

    monkeypatch.setattr(fastest, "_time", time)
    return slow


def test_a_preparation_counts_in_part(clock):
    seconds, steady = fastest._measure("grad_x", range(8, 10))
    assert seconds == dict.fromkeys(fastest._candidates("grad_x"), 4.0)  # two shapes, each 1 + (13 - 1) / 12
    assert steady


def test_a_disturbed_measurement_goes_on(clock):
    products = 2 * 2 * len(fastest._candidates("grad_x"))  # sizes, shapes, libraries
    clock[:] = [1.6] * products  # in the first round of a half
    assert fastest._measure("grad_x", range(8, 10)) == (dict.fromkeys(fastest._candidates("grad_x"), 4.0), True)


@needs_onednn
def test_a_measurement_that_stays_disturbed_is_kept_until_build_measures_again(clock, cache, monkeypatch):
    monkeypatch.setattr(fastest, "_agree", lambda *halves: False)
    fastest.fastest("grad_x", 9)
    assert json.loads(cache().read_text())["disturbed"] == ["grad_x 4-16"]
    fastest._known.clear()  # as in another process
    (line,) = (line for line in fastest.report() if line.startswith("grad_x 4-16"))
    assert line.endswith("(other work disturbed it; `python -m erniem_fast build` measures again)")
    clock[:] = [99.0]
    fastest.fastest("grad_x", 9)
    assert clock == [99.0]  # not measured

    monkeypatch.setattr(fastest, "_agree", lambda *halves: True)
    monkeypatch.setattr(fastest, "_measured", lambda: ["grad_x"])
    fastest.measure_all()
    assert not clock
    assert json.loads(cache().read_text())["disturbed"] == []
    assert not any("disturbed" in line for line in fastest.report())


def test_halves_that_agree():
    one = {"a": 1.0, "b": 3.0}
    assert fastest._agree(one, {"a": 1.4, "b": 2.1})
    assert not fastest._agree(one, {"a": 1.0, "b": 1.9})
    assert not fastest._agree({"a": 1.6, "b": 3.0}, one)


def test_all_kinds_and_ranges_are_measured_and_reported(cache, monkeypatch):
    monkeypatch.setattr(fastest, "_agree", lambda *halves: True)  # even on a busy machine
    assert all("is not measured yet" in line for line in fastest.report())
    assert not cache().exists()
    fastest.measure_all()
    lines = fastest.report()
    assert len(lines) == len(fastest._measured()) * len(fastest.RANGES)
    for line in lines:
        kind, _, by, name, *times = line.split()
        assert by == "by"
        assert name in fastest._candidates(kind)
        assert tuple(times[::3]) == fastest._candidates(kind)
    restart()
    assert fastest.report() == lines


def test_a_measurement_leaves_no_trace(cache):
    """In random numbers and in the modes of the caller, whatever these are."""
    state = torch.random.get_rng_state()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            for kind in KINDS:
                fastest.fastest(kind, 2)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_the_choice_is_the_calls(cache, monkeypatch):
    """What `fastest` names for the kind and the number of tokens."""
    asked = []
    monkeypatch.setattr(dispatch, "fastest", lambda *each: asked.append(each) or "torch")
    x, weight = torch.ones(9, 4), torch.ones(3, 4, requires_grad=True)
    assert library_of("grad_x", x, weight) == "torch"
    linear(x, weight)
    with torch.no_grad():
        linear(x, weight)
    assert asked == [("grad_x", 9), *((kind, 9) for kind in KINDS), ("forward", 9)]
