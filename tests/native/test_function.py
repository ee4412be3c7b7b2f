"""The functions of csrc/ are given addresses: what an address does not say is checked, converted or refused before."""

import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from erniem_fast import ErnieMConfig, ErnieMModel, ops
from erniem_fast.batch import TokenBatch
from erniem_fast.flags import use_implementations
from erniem_fast.native import attention, compiler, embeddings, function, layer, library, linear
from erniem_fast.native import packed as products
from erniem_fast.native.layer import Layers
from erniem_fast.ops import Product
from erniem_fast.reference import Norm
from tests.native import int8_layers
from tests.products import products_by

pytestmark = pytest.mark.skipif(not library.is_built("cpu"), reason="the native library cannot be built here")

NATIVE = {"embeddings": "native", "attention": "native", "bias_gelu": "native", "add_norm": "native"}
HIDDEN = 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Call:
    """A call of a native function, to be made again with other tensors."""

    def __init__(self, function: function.Structure, device: torch.device, dtype: torch.dtype, values: dict):
        self.function, self.device, self.dtype = function, device, dtype
        tensors = {name: value.detach().clone() for name, value in values.items() if isinstance(value, Tensor)}
        self.values = {**values, **tensors}

    def tensors(self, written: bool) -> dict[str, Tensor]:
        names = [name for name in self.function.tensors if (name in self.function.written) == written]
        return {name: self.values[name] for name in names if self.values.get(name) is not None}

    def __call__(self, **changes: Tensor | None) -> dict[str, Tensor]:
        """What the function writes."""
        written = {name: torch.zeros_like(each) for name, each in self.tensors(written=True).items()}
        values = {**self.values, **written, **changes}
        self.function(self.device, self.dtype, **values)
        return {name: values[name] for name in written if values[name] is not None}


class CallOfLayer(Call):
    """A call of a layer whose parameters are to be others."""

    def __call__(self, **changes: Tensor | None) -> dict[str, Tensor]:
        filled = self.function.fill(self.device, self.dtype, **{**self.values, **changes})
        layers = Layers([filled], {"Layer": layer, "PackedLayer": products}[self.function.name].LAYERS)
        x = torch.linspace(-2, 3, 5 * filled.structure.hidden).sin().view(5, -1)
        return {"out": layers(x, int8_layers.packed(3, 2).sequences)}


@pytest.fixture(scope="module", params=DTYPES.values(), ids=DTYPES)
def calls(request) -> Iterator[list[Call]]:
    """A call of every native function, forward and backward, with all tensors that it can have."""
    seen, kept, call, fill = [], [], function.Function.__call__, function.Structure.fill

    def record(function, device, dtype, **values):
        seen.append(Call(function, device, dtype, values))
        call(function, device, dtype, **values)

    def record_layer(structure, device, dtype, **values):
        filled = fill(structure, device, dtype, **values)
        if not isinstance(structure, function.Function):
            seen.append(CallOfLayer(structure, device, dtype, values))
            kept.append(filled)
        return filled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function.Function, "__call__", record)
        patch.setattr(function.Structure, "fill", record_layer)
        run_ops(request.param)
        run_layer()
        linear.forward(torch.empty(5, 7), torch.randn(5, HIDDEN), torch.randn(7, HIDDEN), torch.randn(7))
        run_int8()
        run_rounded_tables()
    yield seen
    kept.clear()  # what calls of layers hold the addresses of


def mask() -> Tensor:
    return torch.tensor([[False, True, True, False, True], [True, True, True, True, False]])


def run_ops(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = TokenBatch.from_mask(mask(), keep_first=True)
    assert batch.sequences.key_bias is not None
    ids, dropout = torch.arange(batch.tokens) % 5, batch.dropout(0.3, torch.tensor([5]))

    def leaf(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    def norm():
        return Norm(leaf(HIDDEN), leaf(HIDDEN), 1e-5)

    with use_implementations(**NATIVE):
        ops.embeddings(ids, ids, leaf(9, HIDDEN), leaf(7, HIDDEN), norm(), 1, dropout, sparse=True).sum().backward()
        x = ops.embeddings(ids, ids, leaf(9, HIDDEN), leaf(7, HIDDEN), norm(), 1, dropout)
        x = ops.attention(torch.cat([x, x, x], dim=1), batch, 3, 0.3, dropout)
        x = ops.add_norm(x, Product(leaf(batch.tokens, HIDDEN), leaf(HIDDEN)), norm(), dropout)
        ops.bias_gelu(Product(x, leaf(HIDDEN)), "gelu", dropout).sum().backward()


def run_layer() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 3, "hidden_size": HIDDEN, "intermediate_size": 41}
    model = ErnieMModel(ErnieMConfig(vocab_size=50, **sizes)).eval()
    with torch.no_grad(), use_implementations(**NATIVE), products_by("native"):
        model(torch.full(mask().shape, 7), attention_mask=mask().long())


def run_int8() -> None:
    assert products._levels.__wrapped__(library.load("cpu"))["plain"] == 255
    products.linear(torch.randn(5, int8_layers.HIDDEN), *int8_layers.LINEARS["q"], out=torch.empty(5, 24))
    linears = {
        name: linear._replace(bias=torch.randn_like(linear.scale)) for name, linear in int8_layers.LINEARS.items()
    }
    sequences, x = int8_layers.BATCHES["padded, with a mask"].sequences, torch.randn(90, int8_layers.HIDDEN)
    rest = int8_layers.NORMS, int8_layers.HEADS, int8_layers.SCALE, "gelu"
    Layers([products.layer_parameters(linears, *rest)], products.LAYERS)(x, sequences)


def run_rounded_tables() -> None:
    batch = TokenBatch.from_mask(mask(), keep_first=True)
    ids, dropout = torch.arange(batch.tokens) % 5, batch.dropout(0.3, torch.tensor([5]))
    words, norm = torch.randn(9, HIDDEN), Norm(torch.randn(HIDDEN), torch.randn(HIDDEN), 1e-5)
    rest = (torch.randn(7, HIDDEN), norm, dropout, True)
    embeddings.forward(ids, ids, words.bfloat16(), *rest)
    embeddings.forward(ids, ids, words.to(torch.int8), *rest, word_scale=torch.rand(9))


def test_every_function_is_called(calls):
    sources = "".join(source.read_text() for source in compiler.SOURCES.glob("*_cpu.cpp"))
    assert {call.function.name for call in calls if isinstance(call.function, function.Function)} == set(
        re.findall(r'extern "C" const char\* (\w+)\(', sources)
    )


def test_a_tensor_that_is_missing_is_refused_by_its_name(calls):
    for call in calls:
        for name in call.function.tensors:
            read_with_seed = name in ("columns", "sequence_ids") and call.values["seed"] is not None
            if name in call.function.optional and not read_with_seed:
                call(**{name: None})
            else:
                with pytest.raises(ValueError, match=f"^{call.function.name}: {name} is None"):
                    call(**{name: None})


def unaligned(x: Tensor) -> Tensor:
    memory = np.frombuffer(bytearray(x.numel() * x.element_size() + 1), np.uint8, offset=1)
    moved = torch.from_numpy(memory).view(x.dtype).view(x.shape).copy_(x)
    assert x.element_size() == 1 or moved.data_ptr() % x.element_size() != 0
    return moved


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def same_in_other_forms(x: Tensor) -> dict[str, Tensor]:
    forms = {"unaligned": unaligned(x), "every other": every_other(x), "offset": torch.cat([x, x])[len(x) :]}
    if x.is_floating_point():
        forms |= {
            "negated": torch._neg_view(-x),
            "imaginary": torch.complex(x, -x).conj().imag if x.itemsize > 2 else x,
        }
        forms |= {"wider": x.double(), "a parameter": nn.Parameter(x)}
    return forms | ({"narrower": x.int()} if x.dtype == torch.int64 and x.abs().max() < 2**31 else {})


def test_inputs_are_read_in_whatever_form_they_come(calls):
    for call in calls:
        expected = call()
        for name, tensor in call.tensors(written=False).items():
            for form, same in same_in_other_forms(tensor).items():
                assert torch.equal(same, tensor), form
                for written, result in call(**{name: same}).items():
                    assert torch.equal(result, expected[written]), f"{call.function.name}: {name} {form}"


class WithoutMemory(Tensor):
    """As sharded and quantised tensors are: it stands for values that lie elsewhere."""

    @staticmethod
    def __new__(cls, like):
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise NotImplementedError(function)


def of_another_kind(x: Tensor) -> Tensor:
    """A tensor whose values the function's type could not hold."""
    if x.is_floating_point():
        return x.to(torch.complex64)
    return x.int() if x.dtype == torch.bool else x.float()


def test_inputs_that_cannot_be_read_are_refused_by_their_names(calls):
    for call in calls:
        for name, tensor in call.tensors(written=False).items():
            others = [WithoutMemory(tensor), tensor.to("meta"), of_another_kind(tensor)]
            others += [tensor.to_sparse(), tensor.unsqueeze(0)]
            for other in others:
                with pytest.raises(ValueError, match=f"^{call.function.name}: {name} "):
                    call(**{name: other})


def test_what_is_written_must_lie_as_the_function_writes_it(calls):
    for call in calls:
        for name, tensor in call.tensors(written=True).items():
            others = [WithoutMemory(tensor), tensor.to("meta"), tensor.double(), every_other(tensor)]
            others += [torch._neg_view(tensor), unaligned(tensor)]
            for other in others:
                with pytest.raises(ValueError, match=f"^{call.function.name}: {name} "):
                    call(**{name: other})


def test_every_size_is_read_from_the_tensors(calls):
    """Callers pass only numbers that no shape says."""
    numbers = {"threshold", "rescale", "eps", "norm1_eps", "norm2_eps", "scale"}
    numbers |= {"heads", "threads", "activation", "padding_idx", "tokens_per_chunk", "out_stride", "kernel"}
    numbers |= {"attention_dtype", "hidden"}  # the latter is said by a layer's parameters
    for call in calls:
        assert {name for name, value in call.values.items() if isinstance(value, int | float)} <= numbers


def test_tensors_that_contradict_each_other_are_named(calls):
    """Each in turn is one shorter along each dimension; a dimension that no other tensor has may be any size."""
    free = set()
    for call in calls:
        tensors = {**call.tensors(written=False), **call.tensors(written=True)}
        shapes = {name: call.function.tensors[name][1:] for name in tensors}
        named = " ".join(str(each) for shape in shapes.values() for each in shape).split()
        for name, tensor in tensors.items():
            for axis, dimension in enumerate(shapes[name]):
                if isinstance(dimension, str) and named.count(dimension) == 1:
                    free.add((call.function.name, dimension))
                    continue
                shorter = tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()
                message = rf"^{call.function.name}: .*\b{name} has shape {re.escape(str(tuple(shorter.shape)))}"
                with pytest.raises(ValueError, match=message):
                    call(**{name: shorter})
    names = {"embeddings_forward": ("words", "max_positions"), "embeddings_scatter": ("table_rows",)}
    names |= {"embeddings_clear": ("hidden",)}
    names |= {"embeddings_bfloat16_forward": ("words", "max_positions"), "embeddings_int8_forward": ("max_positions",)}
    # A packed weight consists of groups of four features, and is refused where x needs more or fewer of these.
    names |= {"packed_linear_forward": ("in_features",), "packed_levels": ("kernels",)}
    names |= {"layers_forward": ("count",), "packed_layers_forward": ("count",)}
    assert free == {(function, each) for function, dimensions in names.items() for each in dimensions}


def test_a_contradiction_says_what_was_expected_and_why():
    message = r"weight has shape (7, 25) on cpu, but needs (7, 24) on cpu: in_features is 24, as x has shape (5, 24)."
    with pytest.raises(ValueError, match=f"^linear_forward: {re.escape(message)}$"):
        linear.forward(torch.empty(5, 7), torch.randn(5, HIDDEN), torch.randn(7, HIDDEN + 1), None)
    message = r"qkv has shape (10, 71) on cpu, but needs (10, 72) on cpu: hidden is 24, as out has shape (10, 24)."
    with pytest.raises(ValueError, match=f"^attention_forward: {re.escape(message)}$"):
        attend(torch.randn(10, 71), heads=3)


def attend(qkv: Tensor, heads: int) -> None:
    """The forward for two sequences of 5 tokens, which writes rows of `HIDDEN` elements."""
    attention._FORWARD(
        torch.device("cpu"),
        torch.float32,
        qkv=qkv,
        longest_first=torch.arange(2),
        cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32),
        out=torch.empty(10, HIDDEN),
        heads=heads,
        threads=1,
        scale=1.0,
        threshold=0,
        rescale=1.0,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_refused(calls, dtype):
    for call in calls:
        with pytest.raises(ValueError, match=f"^{call.function.name} is for .* not {dtype}; cast"):
            call.function.fill(call.device, dtype, **call.values)


THREADS = """
import sys, threading
import torch
from erniem_fast import ErnieMConfig, ErnieMModel
from erniem_fast.native import function, linear

sys.setswitchinterval(1e-6)
torch.set_num_threads(1)
sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
model = ErnieMModel(ErnieMConfig(vocab_size=9, **sizes)).eval()
ids, x, weight, failures = torch.full((1, 5), 7), torch.ones(4, 8), torch.ones(8, 8), []
barrier = threading.Barrier(8)

def first_calls():
    barrier.wait()
    model(ids).pooler_output.sum().backward()
    with torch.inference_mode():
        model(ids)
    for _ in range(600):
        function._linked.cache_clear()  # so that the next call is a first one
        linear.forward(torch.empty(4, 8), x, weight, None)

def run():
    try:
        first_calls()
    except Exception as error:
        failures.append(repr(error))

threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failures)
"""


def test_first_calls_from_several_threads():
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


OUT_OF_MEMORY = """
import resource
import torch
from erniem_fast.native import attention, linear

CPU, THREADS = torch.device("cpu"), 2

def attend(length):
    '''The backward, whose tasks need memory on the threads that run them: two sequences, one a thread.'''
    tensors = {"qkv": torch.zeros(2 * length, 3), "grad_qkv": torch.empty(2 * length, 3)}
    tensors |= {"grad": torch.zeros(2 * length, 1), "longest_first": torch.arange(2)}
    tensors |= {"cu_seqlens": torch.tensor([0, length, 2 * length], dtype=torch.int32)}
    numbers = {"heads": 1, "threads": THREADS, "scale": 1.0, "threshold": 0, "rescale": 1.0}
    return lambda: attention._BACKWARD(CPU, torch.float32, **tensors, **numbers)

def multiply(features):
    '''The product, which needs memory for x transposed on the thread that calls.'''
    x, weight, out = torch.empty(64, features), torch.zeros(1, features), torch.empty(64, 1)
    return lambda: linear.forward(out, x, weight, None)

torch.set_num_threads(THREADS)
attend(256)(), multiply(256)()  # starts the threads, which need memory of their own
calls = [attend(3000), multiply(1 << 20)]
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), hard))
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
attend(256)()
print("goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_function_without_memory_raises():
    result = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    reason = "failed on cpu: there is not enough memory for intermediate results"
    expected = [f"attention_backward {reason}", f"linear_forward {reason}", "goes on"]
    assert result.stdout.splitlines() == expected, result.stdout + result.stderr


def test_a_functions_own_objection_is_raised():
    with pytest.raises(RuntimeError, match=r"^attention_forward failed on cpu: heads must divide hidden$"):
        attend(torch.randn(10, 3 * HIDDEN), heads=5)


def test_no_exception_leaves_the_c_interface():
    """Every function of it is one call of `error_of`, with nothing before it that could throw."""
    for source in (*compiler.SOURCES.glob("*.cpp"), *compiler.SOURCES.glob("*.cu")):
        text = source.read_text()
        bodies = re.findall(r'^extern "C" const char\* \w+\([^{]*\) \{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL)
        assert len(bodies) == text.count('extern "C"') > 0, source.name
        for body in bodies:
            before, *_ = re.split(r"  return error_of\(\s*\[&\] \{", body)
            assert re.fullmatch(r"(  const [\w:<>* ]+ \w+ = [^;]+;\n)*", before), f"{source.name}: {body}"
            assert body.count("return") == 1
