"""The matrix products: the modules' own results, by fewer and cheaper calls where the modules allow it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

from erniem_fast import ops
from erniem_fast.flags import use_implementations
from erniem_fast.linears import Scratch, project, project_side_by_side, scratch_for
from tests.ops.problems import serving
from tests.products import products_by

SIZES = (24, 24, 24)
TOKENS, FEATURES = 7, 32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["add_norm", None], ids=["into an op", "into none"])
def into(request):
    """The op that products go into, by an implementation that adds the bias itself."""
    if request.param is None:
        yield None
        return
    fusing = [name for name in serving(request.param, interpreted=True) if fuses_bias(request.param, name)]
    if not fusing:
        pytest.skip("no implementation here adds the bias itself")
    with use_implementations(**{request.param: fusing[0]}):
        yield request.param


def fuses_bias(op, name):
    return ops.IMPLEMENTATIONS[op][name].fuses_bias


def make_linears(dtype=torch.float32, device="cpu"):
    return [nn.Linear(FEATURES, size, dtype=dtype, device=device) for size in SIZES]


def make_input(dtype=torch.float32, device="cpu"):
    return torch.randn(TOKENS, FEATURES, dtype=dtype, device=device)


def separately(linears, x):
    return torch.cat([linear(x) for linear in linears], dim=-1)


def assert_rounded_alike(out, expected, inputs=FEATURES):
    """Equal but for the order of the sums, which is the library's choice: it differs by processor and by shape.

    Each of a sum's additions rounds by half a unit in the last place of at most the largest value, on either side; the
    sums are of float32 at least, and rounded once more where the result is narrower.
    """
    wide = torch.promote_types(expected.dtype, torch.float32)
    units = inputs * torch.finfo(wide).eps + (expected.dtype != wide) * torch.finfo(expected.dtype).eps
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(out, expected, rtol=0, atol=units * scale)


MODES = {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class LinearCalls(TorchFunctionMode):
    """Counts the calls of `F.linear`."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is F.linear
        return function(*args, **(kwargs or {}))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LowRank(nn.Module):
    """What adapters put in a linear's place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, base.out_features)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Quantised(torch.Tensor):
    """A weight that only knows how to be used in `F.linear`, as quantised and sharded tensors are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(torch.Tensor).round(decimals=1), *bias)
        if function in (torch.cat, torch.addmm, torch.Tensor.t, torch.matmul):
            raise NotImplementedError(f"{function} of a quantised weight")
        return super().__torch_function__(function, types, args, kwargs or {})


def doubled(module, arguments, output):
    return 2 * output


def input_doubled(module, arguments):
    return (2 * arguments[0],)


def with_forward_hook(linear):
    linear.register_forward_hook(doubled)
    return linear


def with_pre_hook(linear):
    linear.register_forward_pre_hook(input_doubled)
    return linear


def with_backward_hook(linear):
    linear.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: (2 * grad_inputs[0],))
    return linear


def with_backward_pre_hook(linear):
    linear.register_full_backward_pre_hook(lambda module, grad_outputs: (2 * grad_outputs[0],))
    return linear


def with_forward_replaced(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


def quantised(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    return linear


def doubling(linear):
    other = Doubling(FEATURES, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


SPECIAL = {
    "forward hook": with_forward_hook,
    "forward pre-hook": with_pre_hook,
    "backward hook": with_backward_hook,
    "backward pre-hook": with_backward_pre_hook,
    "replaced forward": with_forward_replaced,
    "subclass": doubling,
    "adapter": LowRank,
    "parametrised": parametrizations.weight_norm,
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "quantised weight": quantised,
}
every_special = pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)


def test_project_takes_the_bias_apart(into):
    """Where the op adds it; a gradient may need the product, which therefore stays as it is."""
    linear, x = nn.Linear(FEATURES, 24), make_input()
    product, bias, reusable = project(linear, x, into)
    assert not reusable
    if into is None:
        assert bias is None
        assert_rounded_alike(product, linear(x))
    else:
        assert bias is linear.bias
        assert_rounded_alike(product, x @ linear.weight.t())


@pytest.mark.parametrize("op", ["add_norm", "bias_gelu"])
def test_project_leaves_no_bias_to_an_op_that_does_not_add_it_cheaply(op):
    linear, x = nn.Linear(FEATURES, 24), make_input()
    with use_implementations(**{op: "torch"}):
        product, bias, _ = project(linear, x, op)
    assert bias is None
    assert_rounded_alike(product, linear(x))


def test_project_without_a_bias(into):
    linear, x = nn.Linear(FEATURES, 24, bias=False), make_input()
    product, bias, _ = project(linear, x, into)
    assert bias is None
    assert_rounded_alike(product, linear(x))


@every_special
def test_project_calls_a_special_module(special, into):
    """And lets no op write into what it returns."""
    linear, x = special(nn.Linear(FEATURES, 24)), make_input().requires_grad_()
    expected, product = linear(x), project(linear, x, into)
    assert_rounded_alike(product.value, expected)
    assert_rounded_alike(*(torch.autograd.grad(each.sum(), x)[0] for each in (product.value, expected)))
    with torch.no_grad():
        assert not project(linear, x, into).reusable


@pytest.mark.parametrize("tokens", [1, 12, 130])
def test_products_take_the_scratch(tokens, into):
    linear, x = nn.Linear(FEATURES, 24), torch.randn(tokens, FEATURES)
    assert scratch_for(x, 72) is None  # autograd keeps products
    with torch.no_grad():
        scratch = scratch_for(x, 72)
        memory = scratch.memory.fill_(torch.nan)
        assert memory.numel() == 72 * tokens
        product = project(linear, x, into, scratch)
        assert product.reusable
        assert product.x.data_ptr() == memory.data_ptr()
        assert_rounded_alike(product.value, linear(x))
        joined = project_side_by_side([linear] * 3, x, scratch)
        assert joined.data_ptr() == memory.data_ptr()
        assert_rounded_alike(joined, torch.cat([linear(x)] * 3, dim=1))
        assert project(LowRank(linear), x, into, scratch).x.data_ptr() != memory.data_ptr()
        for other in (memory[:-1], memory.double()):  # too small, of another dtype
            assert_rounded_alike(project_side_by_side([linear] * 3, x, Scratch(other)), joined)


@pytest.mark.filterwarnings("error")  # PyTorch warns where it has to resize the memory that it is given
@pytest.mark.parametrize("tokens", [1, 12, 130])
@pytest.mark.parametrize("rows", [slice(5), slice(0)])
def test_a_linear_is_as_large_as_its_weight(tokens, rows):
    linear, x = nn.Linear(FEATURES, 9), torch.randn(tokens, FEATURES)
    linear.weight, linear.bias = (nn.Parameter(each.detach()[rows]) for each in (linear.weight, linear.bias))
    expected = F.linear(x, linear.weight, linear.bias)
    with torch.inference_mode():
        out = project(linear, x, scratch=scratch_for(x, 9)).x
    assert_rounded_alike(out, expected)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_side_by_side_equals_separately(dtype, mode):
    linears, x = make_linears(dtype), make_input(dtype)
    with mode():
        out, expected = project_side_by_side(linears, x), separately(linears, x)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_rounded_alike(out, expected)


@every_mode
@pytest.mark.parametrize("view", ["transposed", "sliced", "empty"])
def test_side_by_side_takes_views(view, mode):
    x = {
        "transposed": torch.randn(FEATURES, TOKENS).t(),
        "sliced": torch.randn(TOKENS, 2 * FEATURES)[:, ::2],
        "empty": torch.randn(0, FEATURES),
    }[view]
    linears = make_linears()
    with mode():
        assert_rounded_alike(project_side_by_side(linears, x), separately(linears, x))


@every_mode
def test_side_by_side_under_autocast(mode):
    linears, x = make_linears(), make_input()
    with mode(), torch.autocast("cpu", torch.bfloat16):
        out, expected = project_side_by_side(linears, x), separately(linears, x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_rounded_alike(out, expected)


def test_gradients_reach_the_separate_parameters():
    linears, x = make_linears(), make_input().requires_grad_()
    leaves = [x, *(parameter for linear in linears for parameter in (linear.weight, linear.bias))]
    grad = torch.randn(TOKENS, sum(SIZES))
    computed = torch.autograd.grad(project_side_by_side(linears, x), leaves, grad)
    expected = torch.autograd.grad(separately(linears, x), leaves, grad)
    for ours, theirs in zip(computed, expected, strict=True):
        assert_rounded_alike(ours, theirs, inputs=sum(SIZES))


def test_frozen_linears_get_no_gradient():
    linears, x = make_linears(), make_input()
    linears[1].requires_grad_(False)
    project_side_by_side(linears, x).sum().backward()
    assert [linear.weight.grad is None for linear in linears] == [False, True, False]


@every_mode
@every_special
@pytest.mark.parametrize("place", range(len(SIZES)))
def test_side_by_side_calls_special_modules(special, place, mode):
    linears, x = make_linears(), make_input()
    linears[place] = special(linears[place])
    with mode():
        assert_rounded_alike(project_side_by_side(linears, x), separately(linears, x))


@every_mode
@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_see_every_linear(register, mode):
    linears, x, seen = make_linears(), make_input(), []
    handle = register(lambda module, *rest: seen.append(module))
    try:
        with mode():
            project_side_by_side(linears, x)
            project(linears[0], x, into="add_norm")
    finally:
        handle.remove()
    assert seen == [*linears, linears[0]]


@every_mode
@pytest.mark.parametrize("place", [None, *range(len(SIZES))])
def test_linears_without_a_bias(place, mode):
    linears, x = make_linears(), make_input()
    for index, linear in enumerate(linears):
        if place in (None, index):
            linear.bias = None
    with mode():
        assert_rounded_alike(project_side_by_side(linears, x), separately(linears, x))


def test_training_takes_one_product():
    linears, x = make_linears(), make_input()
    with products_by("torch"), LinearCalls() as calls:
        project_side_by_side(linears, x)
    assert calls.count == 1


def add_in_place(linear):
    with torch.no_grad():
        linear.weight.add_(1.0)


def add_to_bias_in_place(linear):
    with torch.no_grad():
        linear.bias.add_(1.0)


def add_in_inference_mode(linear):
    with torch.inference_mode():
        linear.weight.add_(1.0)


def add_through_detached(linear):
    linear.weight.detach().add_(1.0)


def step(linear, optimizer, **options):
    optimizer = optimizer(linear.parameters(), lr=0.1, **options)
    linear(make_input()).square().sum().backward()
    optimizer.step()


def load_state(linear, assign):
    other = nn.Linear(linear.in_features, linear.out_features)
    linear.load_state_dict(other.state_dict(), assign=assign)


def replace_parameter(linear):
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))


def swap_data(linear):
    linear.weight.data = torch.randn_like(linear.weight)


def swap_tensors(linear):
    torch.utils.swap_tensors(linear.weight, nn.Parameter(torch.randn_like(linear.weight)))


def write_through_data(linear):
    linear.weight.data.mul_(2.0)
    linear.bias.data.copy_(torch.ones_like(linear.bias))


CHANGES = {
    "in place": add_in_place,
    "bias in place": add_to_bias_in_place,
    "in place in inference mode": add_in_inference_mode,
    "through a detached view": add_through_detached,
    "through data": write_through_data,
    "SGD": lambda linear: step(linear, torch.optim.SGD),
    "AdamW": lambda linear: step(linear, torch.optim.AdamW),
    "AdamW foreach": lambda linear: step(linear, torch.optim.AdamW, foreach=True),
    "AdamW fused": lambda linear: step(linear, torch.optim.AdamW, fused=True),
    "load_state_dict": lambda linear: load_state(linear, assign=False),
    "load_state_dict, assigning": lambda linear: load_state(linear, assign=True),
    "replaced": replace_parameter,
    "data swapped": swap_data,
    "tensors swapped": swap_tensors,
}


@every_mode
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("place", range(len(SIZES)))
def test_a_change_of_the_parameters_is_seen(change, place, mode):
    """Nothing derived from the parameters may outlive a change of them, however it is made."""
    linears, x = make_linears(), make_input()
    for _ in range(2):
        with mode():
            before = project_side_by_side(linears, x).clone()
        change(linears[place])
        with mode():
            after = project_side_by_side(linears, x)
            assert_rounded_alike(after, separately(linears, x))
        assert not torch.equal(before, after), "the test must change something"
