"""The equivalence battery: every kernel that a device can run, forward and backward, against the reference.

The cases are those where kernels go wrong: lengths around the tiles' sizes, sequences without tokens or keys, sizes
that are not powers of two, padding on every side, dropout. Memory that a kernel fails to write reads as NaN. On GPUs
the models' own sizes are checked as well.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from math import inf, log, nan
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import ops
from ..batch import TokenBatch, key_bias_of
from ..configuration import RESERVED_POSITIONS
from ..dropout import Dropout
from ..flags import use_implementations
from ..native import library, packed
from ..native.linear import forward as native_linear
from ..ops import Product
from ..ops.choose import Implementation
from ..ops.triton import refuses_16_bits, triton_function
from ..reference import Norm, dequantise, quantise, quantise_weight, quantised_linear
from .equivalence import Comparison, compare, draw

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EPS = 1e-3  # so large that a kernel without it shows
_PADDING = 1  # the row of the embedding tables that gets no gradient

Problem = tuple[Callable[..., Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        op: a key of `flags.OPS`.
        shape: the inputs' sizes, in words.
        make: takes the inputs' random generator, a device and a dtype, and returns the op as a function of its leaves,
            and the leaves by name.
        size: the size that an implementation must serve; see `ops.choose`.
        terms: takes the leaves and the gradient of the result, and returns by leaf the largest of the terms that cancel
            in a gradient that is always 0; see `compare`.
    """

    op: str
    shape: str
    make: Callable[[torch.Generator, torch.device, torch.dtype], Problem]
    size: int = 0
    terms: Callable[[dict[str, Tensor], Tensor], dict[str, float]] = lambda leaves, grad: {}


@dataclass(frozen=True)
class Check:
    """A case, on an implementation, in a dtype, on a device."""

    case: Case
    implementation: str
    dtype: torch.dtype
    device: torch.device

    @property
    def op(self) -> str:
        return self.case.op

    @property
    def shape(self) -> str:
        return self.case.shape

    def run(self) -> dict[str, Comparison]:
        """Compares the result and every leaf's gradient, by name."""
        generator = torch.Generator().manual_seed(0)
        call, leaves = self.case.make(generator, self.device, self.dtype)
        with use_implementations(**{self.case.op: "reference"}), torch.no_grad():
            out = call(*leaves.values())
        # The gradient is rounded here, once, so that every implementation starts from the same values.
        grad = _randn(generator, self.device, out.dtype, *out.shape)
        inputs = (*leaves.values(), grad)
        with use_implementations(**{self.case.op: "reference"}):
            draws = draw(partial(_solve, call), inputs)
        with use_implementations(**{self.case.op: self.implementation}), _poisoned_memory():
            results = _solve(call, *inputs)
        comparisons, terms = {}, self.case.terms(leaves, grad)
        for index, (name, result) in enumerate(zip(("result", *leaves), results, strict=True)):
            references = [(reference[index], exact[index]) for reference, exact in draws]
            expected, _ = references[0]
            if result.dtype != expected.dtype:  # autograd checks the shapes
                raise RuntimeError(f"{name} is {result.dtype}, not {expected.dtype}")
            comparisons[name] = compare(result, *references, terms=terms.get(name, 0.0))
        return comparisons


@dataclass(frozen=True)
class ProductCheck:
    """The native matrix product, which is not an op: it serves float32 without autograd.

    Attributes:
        tokens, inputs, outputs: the sizes of the product.
        bias: whether the product adds a bias.
        gap: the number of columns to the left and right of the result in memory, which the product must not change.
    """

    tokens: int
    inputs: int
    outputs: int
    bias: bool = True
    gap: int = 0

    op: ClassVar[str] = "product"
    implementation: ClassVar[str] = "native"
    dtype: ClassVar[torch.dtype] = torch.float32
    device: ClassVar[torch.device] = torch.device("cpu")

    @property
    def shape(self) -> str:
        bias, gap = "" if self.bias else ", no bias", f", gaps of {self.gap}" if self.gap else ""
        return f"{self.tokens} x {self.inputs} to {self.outputs}{bias}{gap}"

    def run(self) -> dict[str, Comparison]:
        """Compares the result together with the columns beside it, under the name that ops' results have."""
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.tokens, self.inputs), (self.outputs, self.inputs), (self.outputs,), (self.tokens, self.gap))
        x, weight, bias, beside = (_randn(generator, self.device, self.dtype, *shape) for shape in shapes)
        operands = (x, weight, bias if self.bias else None)
        doubles = (None if operand is None else operand.double() for operand in operands)
        expected, exact = F.linear(*operands), F.linear(*doubles)
        out = torch.cat([beside, torch.full_like(expected, nan), beside], dim=1)
        native_linear(out[:, self.gap : self.gap + self.outputs], *operands)
        expected, exact = (torch.cat([beside.to(y.dtype), y, beside.to(y.dtype)], dim=1) for y in (expected, exact))
        return {"result": compare(out, (expected, exact))}


@dataclass(frozen=True)
class Int8Check(ProductCheck):
    """The native product of 8-bit integers by one of its kernels, which has to compute the reference's very bits."""

    kernel: str = "plain"

    op: ClassVar[str] = "int8"

    @property
    def shape(self) -> str:
        return f"{super().shape}, {self.kernel}"

    def run(self) -> dict[str, Comparison]:
        """Compares as in `ProductCheck`; some tokens are odd."""
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.tokens, self.inputs), (self.outputs, self.inputs), (self.outputs,), (self.tokens, self.gap))
        x, weight, bias, beside = (_randn(generator, self.device, self.dtype, *shape) for shape in shapes)
        weight[self.outputs // 2] = 0.0
        x = _odd_rows(x)
        values, scale = quantise_weight(weight)
        bias, levels = bias if self.bias else None, packed.levels(self.kernel)
        expected = quantised_linear(x, values, scale, bias, levels)
        out = torch.cat([beside, torch.full_like(expected, inf), beside], dim=1)
        packed.linear(
            x, packed.pack(values), scale, bias, torch.int8, out[:, self.gap : self.gap + self.outputs], self.kernel
        )
        return {"result": _same_bits(out, torch.cat([beside, expected, beside], dim=1))}


def _odd_rows(x: Tensor) -> Tensor:
    """Makes some rows hard to round, in place: zeros, NaN and infinity, tiny or huge values, one sign, two values."""
    x[2::11] = 0.0
    x[3::11, x.shape[1] // 2] = nan
    x[4::11, -1] = -inf
    x[5::11] += 10.0
    x[6::11] *= 1e-39
    x[7::11, 0], x[7::11, -1] = 3e38, -3e38  # the range overflows
    x[8::11] = x[8::11].sign() * x[8::11, :1].abs()  # both ends of the range are near ties
    return x


@dataclass(frozen=True)
class QuantiseCheck:
    """The kernel that rounds rows to 8-bit numbers, and the one that makes results of the sums of their products.

    The first has to compute the reference's very bits.

    Attributes:
        tokens, features: the shape.
        dtype: of the input and of the results.
        device: what runs the kernels.
        to: int8 or float8_e4m3fn.
    """

    tokens: int
    features: int
    dtype: torch.dtype
    device: torch.device
    to: torch.dtype

    op: ClassVar[str] = "quantise"
    implementation: ClassVar[str] = "triton"

    @property
    def shape(self) -> str:
        return f"{self.tokens} x {self.features} to {str(self.to).removeprefix('torch.')}"

    def run(self) -> dict[str, Comparison]:
        """Compares the 8-bit numbers, their scales, and the results; rows are as odd as those of `Int8Check`."""
        generator = torch.Generator().manual_seed(0)
        x = _odd_rows(_randn(generator, torch.device("cpu"), torch.float32, self.tokens, self.features))
        x = x.to(self.device, self.dtype)
        expected = quantise(x, self.to)
        sums = torch.randint(-(2**30), 2**30, (self.tokens + 1, self.features), generator=generator, dtype=torch.int32)
        scale_of_sums, weight_scale, bias = (
            _randn(generator, self.device, torch.float32, *shape)
            for shape in ((self.tokens, 1), (self.features,), (self.features,))
        )
        scale_of_sums[2::11], scale_of_sums[3::11] = 0.0, nan
        case = sums.to(self.device), scale_of_sums, 2.0**-30 * weight_scale, bias.to(self.dtype), self.dtype
        with _poisoned_memory():
            values, scale = triton_function("quantise", "quantise")(x=x, dtype=self.to)
            names = "sums", "scale", "weight_scale", "bias", "dtype"
            result = triton_function("quantise", "dequantise")(**dict(zip(names, case, strict=True)))
        exact = dequantise(*(each.double() for each in case[:-1]), torch.float64)
        return {
            "values": _same_bits(values.float(), expected[0].float()),
            "scale": _same_bits(scale, expected[1]),
            "result": compare(result, (dequantise(*case), exact)),
        }


AnyCheck = Check | ProductCheck | QuantiseCheck


def _same_bits(result: Tensor, expected: Tensor) -> Comparison:
    """Whether a result equals the expected one, NaN where that is NaN."""
    same = (result == expected) | (result.isnan() & expected.isnan())
    differences = (result - expected).abs().nan_to_num(nan=inf).masked_fill(same, 0.0)
    return Comparison(F.pad(differences, (0, 1)).amax().item() if len(result) else 0.0, 0.0)


def verify(device: torch.device, verbose: bool = False) -> bool:
    """Runs the battery on a device, and prints a line for each op and implementation as it finishes, and all failures.

    Args:
        device: what runs the kernels.
        verbose: whether to print each check.

    Returns:
        Whether there were any checks, and all passed.
    """
    reasons = [
        *((op, name, kernel.objection(device, torch.float32, size=0)) for op, name, kernel in _kernels()),
        (QuantiseCheck.op, QuantiseCheck.implementation, refuses_16_bits(device)),
        *((check.op, check.implementation, _product_objection(device)) for check in (ProductCheck, Int8Check)),
    ]
    for op, name, reason in reasons:
        if reason is not None:
            print(f"{op}: {name} is not checked: {reason}")
    checks, failures = battery(device), 0
    groups = {(check.op, check.implementation): [] for check in checks}
    for check in checks:
        groups[check.op, check.implementation].append(check)
    with tqdm(chain(*groups.values()), total=len(checks), unit="checks", disable=None, leave=False) as bar:
        numbered = enumerate(bar, 1)
        for (op, name), group in groups.items():
            failures += _verify_group(f"{op:10} {name:6}", islice(numbered, len(group)), len(checks), verbose)
    print(f"{len(checks)} checks, {failures} failures")
    return bool(checks) and not failures


def _verify_group(title: str, checks: Iterable[tuple[int, AnyCheck]], total: int, verbose: bool) -> int:
    """Runs numbered checks of one kind and prints a line about them; returns how many failed."""
    start, ratios = time.perf_counter(), []
    for number, check in checks:
        found = outcome(check)
        ratios.append(found.ratio)
        if verbose or not found.passed:
            tqdm.write(f"{number:3}/{total} {found.line}")
    failures, largest = sum(ratio > 1 for ratio in ratios), max(ratios)
    error = "beyond the bound" if failures else f"{largest:.2f} of its bound"
    seconds = time.perf_counter() - start
    tqdm.write(f"{title} {len(ratios):4} checks, {failures} failures, largest error {error}, {seconds:.1f} s")
    return failures


class Outcome(NamedTuple):
    """What came of a check.

    Attributes:
        line: the error that came closest to its bound, in words: `result`, or the leaf that has this gradient.
        ratio: this error relative to its bound; infinite if the check failed.
    """

    line: str
    ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def outcome(check: AnyCheck) -> Outcome:
    """Runs a check; one that raises an error has failed."""
    dtype = str(check.dtype).removeprefix("torch.")
    line = f"{check.op:10} {check.implementation:6} {dtype:8} {check.shape:42}"
    try:
        name, worst = max(check.run().items(), key=lambda item: item[1].ratio)
    except Exception as error:  # a kernel that cannot run must not keep the others from being checked
        return Outcome(f"{line} {type(error).__name__}: {error}  FAIL", inf)
    line += f" {name:14} error {worst.error:.1e}, bound {worst.bound:.1e}"
    return Outcome(f"{line}  {'pass' if worst.holds else 'FAIL'}", worst.ratio)


def battery(device: torch.device) -> list[AnyCheck]:
    """All checks of this library's kernels that run on a device; PyTorch's own are not checked."""
    interpreted = device.type != "cuda"
    checks: list[AnyCheck] = [
        Check(case, name, dtype, device)
        # Each size is compiled for a GPU, which takes as long as running a whole small case in the interpreter.
        for case in (*_HARD, *(_small(range(1, 13)) if interpreted else (*_small((1, 2, 3)), *_MODELS)))
        for op, name, implementation in _kernels()
        if op == case.op
        for dtype in _DTYPES
        if implementation.objection(device, dtype, case.size) is None
    ]
    checks += _quantise_checks(device)
    if _product_objection(device) is not None:
        return checks
    return [
        *checks,
        *_PRODUCTS,
        *(Int8Check(*sizes, kernel=kernel) for kernel in packed.kernels(torch.int8) for sizes in _INT8),
    ]


def _quantise_checks(device: torch.device) -> list[QuantiseCheck]:
    if refuses_16_bits(device) is not None:
        return []
    serves_float8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return [
        QuantiseCheck(*shape, dtype, device, to)
        for shape in _QUANTISED
        for dtype in _DTYPES
        for to in (torch.int8, *((torch.float8_e4m3fn,) if serves_float8 else ()))
    ]


def _kernels() -> list[tuple[str, str, Implementation]]:
    return [
        (op, name, implementation)
        for op, implementations in ops.IMPLEMENTATIONS.items()
        for name, implementation in implementations.items()
        if name not in ("torch", "reference")
    ]


def _product_objection(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on cpu, not on {device}."
    return None if library.is_built("cpu") else library.status()["cpu"]


def _solve(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result of a call, and the gradients of its leaves. The last input is the gradient of the result."""
    *leaves, grad = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that elements that a kernel fails to write are noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _randn(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def _dropout(batch: TokenBatch, p: float) -> Dropout | None:
    return batch.dropout(p, torch.tensor([0x123456789ABCDEF], device=batch.columns.device)) if p else None


# --- Layouts ---------------------------------------------------------------------------------------------------------


def _sequences(*lengths: int) -> Callable[[torch.device], TokenBatch]:
    """A layout of sequences that came packed."""

    def layout(device: torch.device) -> TokenBatch:
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
        return TokenBatch.from_cu_seqlens(cu_seqlens, max(lengths), sum(lengths))

    return layout


def _mask(device: torch.device) -> Tensor:
    """Rows with padding at the right, at the left, in between, everywhere, and none."""
    mask = torch.ones(5, 70, dtype=torch.bool, device=device)
    mask[0, 33:] = False
    mask[1, :66] = False
    mask[2, ::3] = False
    mask[3] = False
    return mask


def _packed(device: torch.device) -> TokenBatch:
    """First columns are computed even where they are padding; no token attends to them there."""
    return TokenBatch.from_mask(_mask(device), keep_first=True)


def _left_padded(device: torch.device) -> TokenBatch:
    """No sequence begins in a column that is a multiple of four, where dropout's generator starts a new group."""
    column, first = torch.arange(70, device=device), torch.tensor([[5], [66], [35]], device=device)
    return TokenBatch.from_mask(column >= first, keep_first=False)


def _padded(device: torch.device) -> TokenBatch:
    return TokenBatch.padded((5, 70), device, key_bias_of(_mask(device)))


def _biased(device: torch.device) -> TokenBatch:
    """Beside the masked ones, keys that stand for many and keys that count for less than one."""
    key_bias = key_bias_of(_mask(device))
    key_bias[:, ::5] += log(400)
    key_bias[:, 1::5] -= 2.0
    key_bias[2, 0] = log(400)  # heavy, right behind a row whose last tile of keys is not full
    return TokenBatch.padded((5, 70), device, key_bias)


def _ranged(*lengths: int) -> Callable[[torch.device], TokenBatch]:
    """A layout of queries that see one half of their sequence, neighbours, or nothing; some see keys beyond it too."""

    def layout(device: torch.device) -> TokenBatch:
        batch = _sequences(*lengths)(device)
        index, length = batch.sequences.indices(), batch.sequences.cu_seqlens.diff()[batch.sequences.sequence_ids]
        half = (index * 2 >= length) * (length // 2)
        ranges = torch.stack([half, half + length // 2 + 5 * (index % 2)], dim=1)
        ranges[::7] = torch.stack([index - 3, index + 2], dim=1)[::7]
        ranges[::11, 1] = 0
        return batch.attending_to(ranges.int())

    return layout


def _ranged_alike(device: torch.device) -> TokenBatch:
    """All queries see the same keys, one more than fills tiles of any size."""
    batch = _sequences(90)(device)
    return batch.attending_to(torch.tensor([[0, 65]], dtype=torch.int32, device=device).expand(90, 2))


def _ranged_and_biased(device: torch.device) -> TokenBatch:
    batch = _biased(device)
    index = batch.sequences.indices()
    return batch.attending_to(torch.stack([index // 20 * 16, index // 20 * 16 + 30], dim=1).int())


_LAYOUTS = {
    "no tokens": _sequences(0, 0),
    "1 token": _sequences(0, 1),
    "18 tokens": _sequences(5, 0, 13),
    "lengths around 16": _sequences(1, 2, 15, 16, 17),
    "lengths around 64": _sequences(63, 0, 64, 65),
    "lengths around 128": _sequences(127, 128, 129),
    "lengths 2, 512, 257": _sequences(2, 512, 257),
    "packed with holes": _packed,
    "padded at the left": _left_padded,
    "padded with a mask": _padded,
    "padded with key biases": _biased,
    "with key ranges": _ranged(63, 0, 130, 1),
    "with short key ranges": _ranged(5, 0, 60),
    "with equal key ranges": _ranged_alike,
    "padded with both": _ranged_and_biased,
    "32 of 1 to 497": _sequences(*range(1, 512, 16)),
    "32 of 512": _sequences(*[512] * 32),
}


# --- Cases -----------------------------------------------------------------------------------------------------------


def _attention(layout: str, heads: int, head_dim: int, p: float = 0.0, ties: bool = False, low: bool = False) -> Case:
    """With `ties`, products of queries and keys are large, close together and exact in every dtype; with `low`, they
    are that, but far below zero."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Problem:
        batch = _LAYOUTS[layout](device)
        leaves = {"qkv": _randn(generator, device, dtype, batch.tokens, 3 * heads * head_dim)}
        if ties or low:
            query, key, _ = leaves["qkv"].unflatten(1, (3, heads, head_dim)).unbind(1)
            for factor in (query, key):
                factor.round_()
                factor[..., 0] = 128.0
            if low:
                key[..., 0] = -128.0
        return lambda qkv: ops.attention(qkv, batch, heads, head_dim**-0.5, _dropout(batch, p)), leaves

    name = f"{layout}, {heads} x {head_dim}, p {p}{', ties' if ties else ''}{', low' if low else ''}"
    return Case("attention", name, make, size=head_dim)


def _bias_gelu(layout: str, features: int, activation: str = "gelu", p: float = 0.0, bias: bool = True) -> Case:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Problem:
        batch = _LAYOUTS[layout](device)
        leaves = {"x": 2 * _randn(generator, device, dtype, batch.tokens, features)}
        if bias:
            leaves["bias"] = _randn(generator, device, dtype, features)

        def call(x: Tensor, bias: Tensor | None = None) -> Tensor:
            return ops.bias_gelu(Product(x, bias), activation, _dropout(batch, p))

        return call, leaves

    name = f"{layout} x {features}, {activation}, p {p}{'' if bias else ', no bias'}"
    return Case("bias_gelu", name, make)


def _add_norm(
    layout: str,
    hidden: int,
    p: float = 0.0,
    bias: bool = True,
    mixed: bool = False,
    equal: bool = False,
    eps: float = _EPS,
) -> Case:
    """With `mixed`, all but x and its bias are float32, as under autocast.

    With `equal`, all values of a row are large and equal.
    """

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Problem:
        batch = _LAYOUTS[layout](device)
        outer = torch.float32 if mixed else dtype
        leaves = {
            "residual": _randn(generator, device, outer, batch.tokens, hidden) + 3,
            "x": _randn(generator, device, dtype, batch.tokens, hidden),
            "weight": _randn(generator, device, outer, hidden),
            "norm_bias": _randn(generator, device, outer, hidden),
        }
        if bias:
            leaves["bias"] = _randn(generator, device, dtype, hidden)
        if equal:
            leaves["residual"][:] = 1000 * leaves["residual"][:, :1]
            leaves["x"].zero_()

        def call(residual: Tensor, x: Tensor, weight: Tensor, norm_bias: Tensor, bias: Tensor | None = None) -> Tensor:
            return ops.add_norm(residual, Product(x, bias), Norm(weight, norm_bias, eps), _dropout(batch, p))

        return call, leaves

    notes = {"no bias": not bias, "mixed": mixed, "equal": equal, f"eps {eps}": eps != _EPS}
    name = ", ".join([f"{layout} x {hidden}", f"p {p}", *(note for note, holds in notes.items() if holds)])
    return Case("add_norm", name, make, terms=_terms_of_norm)


def _embeddings(
    layout: str, words: int, hidden: int, p: float = 0.0, equal: bool = False, table: torch.dtype | None = None
) -> Case:
    """With `equal`, all values of a row are large and equal.

    With `table`, the word table has that dtype, if all else is in float32 on the CPU.
    """

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Problem:
        batch = _LAYOUTS[layout](device)
        ids = torch.randint(words, (batch.tokens,), generator=generator).to(device)
        positions = batch.columns + RESERVED_POSITIONS
        leaves = {
            "word_table": _randn(generator, device, dtype, words, hidden),
            "position_table": _randn(generator, device, dtype, 512 + RESERVED_POSITIONS, hidden),
            "weight": _randn(generator, device, dtype, hidden),
            "norm_bias": _randn(generator, device, dtype, hidden),
        }
        if equal:
            for name in ("word_table", "position_table"):
                leaves[name][:] = 1000 * leaves[name][:, :1]

        rounded = None
        if table is not None and dtype == torch.float32 and device.type == "cpu":
            word_table = leaves.pop("word_table")
            rounded = quantise_weight(word_table) if table == torch.int8 else (word_table.to(table), None)

        def call(*tensors: Tensor) -> Tensor:
            *words, position_table, weight, norm_bias = tensors
            word_table, scale = rounded or (*words, None)
            norm, dropout = Norm(weight, norm_bias, _EPS), _dropout(batch, p)
            tables = (word_table, position_table)
            return ops.embeddings(ids, positions, *tables, norm, _PADDING, dropout, word_scale=scale)

        return call, leaves

    note = f"{', equal' if equal else ''}{f', words in {table}' if table else ''}"
    return Case("embeddings", f"{layout} x {hidden}, p {p}{note}", make, terms=_terms_of_norm)


def _terms_of_norm(leaves: dict[str, Tensor], grad: Tensor) -> dict[str, float]:
    """Of rows with one feature: the gradient of a row is a product minus the mean of the products, which is itself."""
    if grad.shape[1] > 1:
        return {}
    largest = (grad.abs().amax() * leaves["weight"].abs().amax()).item() * _EPS**-0.5
    return {name: largest for name in leaves if name not in ("weight", "norm_bias")}


# The cheapest cases come first; they find most faults.
_HARD = (
    _embeddings("18 tokens", 9, 97, p=0.3),
    _embeddings("padded with a mask", 50, 96, p=0.3),
    _embeddings("lengths around 64", 300, 768),
    _embeddings("lengths 2, 512, 257", 2, 96),  # a word of hundreds of tokens
    _embeddings("lengths around 64", 50, 1024, p=0.1),
    _embeddings("18 tokens", 9, 97, equal=True),
    _embeddings("18 tokens", 9, 97, p=0.3, table=torch.int8),
    _embeddings("lengths around 16", 50, 768, table=torch.bfloat16),
    _embeddings("18 tokens", 9, 96, p=1.0),
    _embeddings("no tokens", 9, 96, p=0.1),
    _attention("18 tokens", 2, 8, p=0.5),
    _attention("lengths around 16", 3, 64),
    _attention("lengths around 64", 1, 128, p=0.1),
    _attention("lengths around 64", 2, 64, p=0.1),
    _attention("padded with key biases", 2, 64),
    _attention("lengths around 64", 1, 16, p=0.1, ties=True),
    _attention("lengths around 64", 1, 16, ties=True),
    _attention("18 tokens", 1, 16, low=True),
    _attention("with short key ranges", 1, 16, low=True),
    _attention("with equal key ranges", 1, 16),
    _attention("18 tokens", 1, 256, p=0.1),
    _attention("packed with holes", 2, 32, p=0.3),
    _attention("padded at the left", 1, 128, p=0.3),
    _attention("padded with a mask", 2, 48, p=0.1),
    _attention("padded with key biases", 1, 128),
    _attention("with key ranges", 1, 64),
    _attention("with short key ranges", 2, 32, p=0.1),
    _attention("padded with both", 1, 48, p=0.3),
    _attention("lengths around 128", 1, 128, p=0.1),
    _attention("lengths around 128", 1, 64),
    _attention("lengths 2, 512, 257", 1, 32, p=0.1),
    _attention("18 tokens", 2, 64, p=1.0),
    _attention("no tokens", 2, 64, p=0.1),
    _bias_gelu("18 tokens", 97, p=0.3),
    _bias_gelu("18 tokens", 96, "relu", p=0.1),
    _bias_gelu("18 tokens", 1000, "gelu_tanh", p=0.1),
    _bias_gelu("packed with holes", 96, p=0.3),
    _bias_gelu("lengths around 128", 384, p=0.1),
    _bias_gelu("lengths around 16", 3072),
    _bias_gelu("lengths around 16", 768, bias=False),
    _bias_gelu("1 token", 4096, p=0.1),
    _bias_gelu("18 tokens", 96, p=1.0),
    _bias_gelu("no tokens", 96, p=0.1),
    _add_norm("18 tokens", 97, p=0.3),
    _add_norm("18 tokens", 1000, mixed=True),
    _add_norm("18 tokens", 1024, p=0.1),
    _add_norm("lengths around 128", 96, p=0.1),
    _add_norm("lengths around 16", 384),
    _add_norm("lengths around 16", 768, p=0.1, mixed=True),
    _add_norm("18 tokens", 768, bias=False),
    _add_norm("18 tokens", 97, bias=False, equal=True),
    _add_norm("18 tokens", 96, eps=0.0),
    _add_norm("1 token", 4096, p=0.1),
    _add_norm("18 tokens", 96, p=1.0),
    _add_norm("no tokens", 96, p=0.1),
)


def _small(sizes: Iterable[int]) -> tuple[Case, ...]:
    """Every op at sizes below and around a vector's width and the group of elements that dropout draws at once."""
    return tuple(
        case
        for size in sizes
        for p in (0.0, 0.3)
        for case in (
            _embeddings("18 tokens", 9, size, p),
            _attention("18 tokens", 2, size, p),
            _bias_gelu("18 tokens", size, p=p),
            _add_norm("18 tokens", size, p),
        )
    )


# Numbers of tokens around the vectors' widths, and in several blocks; sizes around the tiles', and the models'.
_PRODUCTS = (
    *(ProductCheck(tokens, 31, 41) for tokens in (1, 4, 15, 16, 17, 20, 33, 39, 64, 65, 71, 150)),
    ProductCheck(7, 96, 24, bias=False),
    ProductCheck(33, 7, 1),
    ProductCheck(17, 33, 97, gap=5),
    ProductCheck(17, 768, 3072, bias=False),
    ProductCheck(20, 1024, 50),  # the product reads rows of a page or more in another order
    ProductCheck(64, 768, 768, gap=768),
    ProductCheck(0, 32, 8),
)

# Numbers of tokens around those of the kernels' tiles, and in several blocks; sizes around the blocks'.
_INT8 = (
    *((tokens, 31, 41) for tokens in (0, 1, 3, 5, 12, 13, 30, 200)),
    (13, 97, 64),
    (12, 96, 3, False),
    (5, 1, 33),
    (2, 4, 1),
    (17, 1031, 70, True, 5),
)

# Tokens and features around those of tiles; and the sizes of the base and the large model.
_QUANTISED = ((0, 96), (1, 1), (23, 7), (13, 97), (13, 300), (300, 96), (12, 768), (25, 1024), (5, 3072), (23, 4096))

# The sizes of the base and the large model.
_MODELS = tuple(
    case
    for layout in ("32 of 1 to 497", "32 of 512")
    for p in (0.0, 0.1)
    for hidden, heads in ((768, 12), (1024, 16))
    for case in (
        _embeddings(layout, 30_000, hidden, p),
        _attention(layout, heads, 64, p),
        _bias_gelu(layout, 4 * hidden, p=p),
        _add_norm(layout, hidden, p),
    )
)
