"""The native embeddings against the float64 reference: on the CPU, on a CUDA device, and the CUDA source on a CPU.

Where no CUDA device is at hand, cuda_on_host/ makes the device's kernels run on CPU tensors.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from erniem_fast import dropout, reference
from erniem_fast.batch import TokenBatch
from erniem_fast.flags import use_kernels
from erniem_fast.native import compiler, library
from erniem_fast.native import embeddings as native_embeddings
from erniem_fast.native.build import build, compile_libraries
from erniem_fast.native.function import dropout_values
from erniem_fast.ops import embeddings
from erniem_fast.reference import Norm
from tests.batches import two_sequences

PADDING, EPS = 1, 1e-5
HIDDEN = [1, 7, 96, 384, 768, 1024, 1031]
HALVES = [torch.float16, torch.bfloat16]
STATM = Path("/proc/self/statm")
CUDA_ON_HOST = Path(__file__).parent / "cuda_on_host"


@pytest.fixture(
    scope="module", params=["cpu", "cuda_on_host", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True
)
def device(request, tmp_path_factory) -> torch.device:
    """Each library in turn; the device of the tensors that it takes."""
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cuda_on_host":
            built = tmp_path_factory.mktemp("cache") / "native_cuda_on_host.so"
            build_cuda_on_host(built)
            patch.setattr(library, "path", lambda device: built)
        else:
            build([device.type])
        yield device


@pytest.fixture(autouse=True)
def poisoned():
    """Fills what `empty` allocates with NaN, so that an element which is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def build_cuda_on_host(path: Path) -> None:
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-w", f"-I{CUDA_ON_HOST}"]
    compile_libraries({path: compiler.Recipe(compiler.cpp(), flags, [CUDA_ON_HOST / "embeddings.cpp"])})


def masks(rows: int, columns: int) -> dict[str, Tensor]:
    """The shapes of padding masks, `(rows, columns)`."""
    lengths = torch.randint(1, columns, (rows, 1))
    column = torch.arange(columns)
    holes = torch.rand(rows, columns) < 0.6
    empty_row = column < lengths
    empty_row[rows // 2] = False
    return {
        "full": torch.ones(rows, columns, dtype=torch.bool),
        "right padding": column < lengths,
        "left padding": column >= columns - lengths,
        "holes": holes,
        "empty row": empty_row,
        "all empty": torch.zeros(rows, columns, dtype=torch.bool),
    }


def arranged(tables: list[Tensor]) -> tuple[Tensor, Tensor, Norm]:
    """The tables of words and positions, and the layer norm."""
    words, positions, *norm = tables
    return words, positions, Norm(*norm, EPS)


class Case:
    """Random inputs of the op, many ids repeated and some of them padding."""

    def __init__(self, batch: TokenBatch, hidden: int, dtype: torch.dtype = torch.float32, p: float = 0.0):
        device, self.dtype = batch.columns.device, dtype
        words, max_positions = 50, 40
        self.ids = torch.randint(0, words, (batch.tokens,), device=device)
        self.positions = torch.randint(0, max_positions, (batch.tokens,), device=device)
        shapes = ((words, hidden), (max_positions, hidden), (hidden,), (hidden,))
        self.tables = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        self.grad = torch.randn(batch.tokens, hidden, device=device).to(dtype)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
        self.dropout = batch.dropout(p, seed) if p else None

    def run(self, implementation: str, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
        """The result and the gradients of the tables, of weight and of norm_bias."""
        leaves = [each.to(dtype or self.dtype).detach().requires_grad_() for each in self.tables]
        with use_kernels(embeddings=implementation):
            out = embeddings(self.ids, self.positions, *arranged(leaves), PADDING, self.dropout, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))]


def error(output: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest value."""
    if output.numel() == 0:
        return 0.0
    return ((output.double() - exact).abs().amax() / exact.abs().amax().clamp(min=1e-30)).item()


NAMES = ("out", "word_table", "position_table", "weight", "norm_bias")


def assert_float32(case: Case, **options) -> None:
    results = zip(NAMES, case.run("native", **options), case.run("reference", torch.float64), strict=True)
    for name, result, exact in results:
        assert error(result, exact) < (1e-6 if name == "out" else 1e-5), name


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_float32_is_the_reference(device, hidden, p):
    torch.manual_seed(hidden)
    for tokens in (0, 1, 3, 45):
        assert_float32(Case(two_sequences(tokens, device), hidden, p=p))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_halves_are_as_exact_as_the_reference_in_them(device, hidden, dtype):
    """At most twice its error, plus eight units in the last place of the largest value for rounding it was spared."""
    torch.manual_seed(hidden)
    case = Case(two_sequences(21, device), hidden, dtype, p=0.1)
    same, exact = case.run("reference"), case.run("reference", torch.float64)
    for name, result, reference_result, truth in zip(NAMES, case.run("native"), same, exact, strict=True):
        slack = 8 * torch.finfo(result.dtype).eps
        assert error(result, truth) <= 2 * error(reference_result, truth) + slack, name


@pytest.mark.parametrize("hidden", [7, 96])
def test_many_tokens(device, hidden, request):
    """Sums over tokens stay exact, and chunks and runs of equal ids are many."""
    if request.node.callspec.params["device"] == "cuda_on_host":
        pytest.skip("too slow")
    torch.manual_seed(0)
    assert_float32(Case(two_sequences(100_000, device), hidden, p=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1, 31, 32])
def test_runs_of_every_length(device, start, dtype):
    """Runs that end in their chunk, at its end, in the next one and many later; sums of whole numbers are exact."""
    torch.manual_seed(start)
    lengths = torch.tensor([start, 1, 32, 31, 2, 33, 64, 65, 30, 350, 1, 5, 96, 3, 0, 7])
    index = torch.arange(len(lengths)).repeat_interleave(lengths)
    index = index[torch.randperm(len(index))].to(device)
    rows = torch.randint(-1, 2, (len(index), 7), device=device)
    exact = torch.zeros(len(lengths), 7, dtype=torch.int64, device=device).index_add(0, index, rows)
    exact[5] = 0
    assert exact.abs().amax() > 9
    assert torch.equal(native_embeddings._scatter(rows.to(dtype), index, len(lengths), 5), exact.to(dtype))


@pytest.mark.parametrize("shape", masks(4, 8))
@pytest.mark.parametrize("keep_first", [False, True])
def test_every_mask_shape(device, shape, keep_first):
    torch.manual_seed(1)
    batch = TokenBatch.from_mask(masks(4, 8)[shape].to(device), keep_first=keep_first)
    assert_float32(Case(batch, 96, p=0.3))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("hidden", [1, 7, 96, 1031])
def test_dropout_has_the_bits_of_every_other_op(device, hidden, p):
    torch.manual_seed(2)
    batch = TokenBatch.from_mask(masks(3, 7)["holes"].to(device), keep_first=True)
    case = Case(batch, hidden, p=p)
    case.tables[2].zero_()  # weight
    case.tables[3].fill_(1.0)  # norm_bias
    out = case.run("native")[0]
    mask = dropout.dropout_mask(case.dropout.seed, p, hidden, batch.columns, batch.sequences.sequence_ids)
    assert torch.equal(out, mask * torch.tensor(dropout.rescale(p), device=device))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_of_a_half_is_read_and_rounded_as_by_torch(device, dtype):
    """The saved sum of a word and a position row: all 65,536 patterns of bits, with others added."""
    torch.manual_seed(3)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(256, 256)
    word_table, position_table = (
        patterns.view(dtype),
        patterns.flatten()[torch.randperm(2**16)].view(256, 256).view(dtype),
    )
    position_table[:8] = 0.0
    rows, ones = torch.arange(256, device=device), torch.ones(256, device=device)
    norm = Norm(ones, ones, EPS)
    _, z = native_embeddings.forward(rows, rows, word_table, position_table, norm, dropout=None, save=True)
    expected = (word_table.float() + position_table.float()).to(dtype)
    torch.testing.assert_close(z, expected, rtol=0, atol=0, equal_nan=True)


def test_the_padding_row_has_no_gradient(device):
    torch.manual_seed(4)
    case = Case(two_sequences(45, device), 96)
    case.ids[:20], case.positions[::3] = PADDING, PADDING
    for grad_table in case.run("native")[1:3]:
        assert grad_table[PADDING].abs().amax() == 0.0
        assert grad_table.abs().amax() > 0.0


def test_gradients_are_the_same_at_every_run_and_number_of_threads(device):
    torch.manual_seed(5)
    case = Case(two_sequences(300, device), 96, p=0.1)
    threads = torch.get_num_threads()
    expected = case.run("native")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results = case.run("native")
        torch.set_num_threads(threads)
        assert all(torch.equal(result, first) for result, first in zip(results, expected, strict=True))


def test_a_large_tables_gradient_takes_the_memory_of_its_words_alone(device, request):
    if request.node.callspec.params["device"] != "cpu" or not STATM.exists():
        pytest.skip("about the CPU's memory, as Linux reports it")
    words, hidden = 200_000, 64  # 51 MB
    case = Case(two_sequences(100, device), hidden)
    case.tables[0] = torch.zeros(words, hidden)
    case.ids = torch.randint(0, words, (100,))
    before = resident_bytes()
    grad_words = case.run("native")[1]
    assert resident_bytes() - before < 5e6
    exact = case.run("reference", torch.float64)[1]
    assert error(grad_words, exact) < 1e-5
    grad_words += 1  # as an optimizer may
    assert error(grad_words, exact + 1) < 1e-5


def resident_bytes() -> int:
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("implementation", ["native", "triton", "torch", "reference"])
def test_the_word_tables_gradient_can_be_sparse(device, implementation):
    torch.manual_seed(6)
    case = Case(two_sequences(45, device), 96, p=0.1)
    case.ids[:5] = PADDING
    grad_words = case.run(implementation, sparse=True)[1].cpu()
    dense = case.run("reference")[1].cpu()
    assert grad_words.layout == torch.sparse_coo
    assert grad_words.shape == dense.shape
    assert grad_words._nnz() == 45
    torch.testing.assert_close(grad_words.to_dense(), dense, rtol=1e-5, atol=1e-5)
    assert grad_words.to_dense()[PADDING].abs().amax() == 0.0


@pytest.mark.parametrize("name", ["ids", "positions"])
@pytest.mark.parametrize("value", [-1, 2**31, 50])
def test_rows_out_of_range_are_named_on_the_cpu(device, name, value):
    if device.type != "cpu":
        pytest.skip("a device would have to be waited for")
    mask = torch.tensor([[True, False, True], [False, True, True]])
    batch = TokenBatch.from_mask(mask, keep_first=False)
    case = Case(batch, 96)
    getattr(case, name)[2:] = value
    size = 50 if name == "ids" else 40
    with pytest.raises(IndexError, match=f"{name} has {value} at token 2, but its table has {size} rows"):
        case.run("native")


@pytest.mark.parametrize("hidden", [7, 96])
def test_rows_out_of_range_are_never_read(device, hidden):
    """Without the check, which would make a device wait, their tokens are NaN and take no part in the gradients."""
    torch.manual_seed(7)
    case = Case(two_sequences(9, device), hidden)
    good = {"word_table": case.tables[0], "position_table": case.tables[1]}
    case.ids[:3] = torch.tensor([-1, 50, 2**60])
    case.positions[3:5] = torch.tensor([-(2**40), 40])
    out = torch.empty(9, hidden, device=device)
    native_embeddings._FORWARD(
        out.device,
        torch.float32,
        ids=case.ids,
        positions=case.positions,
        weight=case.tables[2],
        norm_bias=case.tables[3],
        out=out,
        z=None,
        eps=EPS,
        **good,
        **dropout_values(None),
    )
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()
    scattered = native_embeddings._scatter(torch.ones(9, hidden, device=device), case.ids, 50, PADDING)
    counts = torch.bincount(case.ids[3:], minlength=50).float()
    counts[PADDING] = 0.0
    assert torch.equal(scattered, counts[:, None].expand(-1, hidden))


def test_tensors_of_a_wrong_shape_are_refused(device):
    case = Case(two_sequences(9, device), 96)
    case.positions = case.positions[:4]
    with pytest.raises(
        ValueError, match=r"positions has shape \(4,\) on .* needs \(9,\) on .*: tokens is 9, as ids has shape \(9,\)"
    ):
        case.run("native")


def test_inputs_need_not_be_contiguous_nor_aligned(device):
    torch.manual_seed(8)
    case = Case(two_sequences(9, device), 96, p=0.1)
    expected = case.run("native")
    case.ids = case.ids.repeat_interleave(2)[::2]
    case.grad = case.grad.t().contiguous().t()
    flat = torch.cat([torch.zeros(1, device=device), case.tables[0].flatten()])
    unaligned = flat[1:].view_as(case.tables[0])
    assert unaligned.data_ptr() % 16 != 0
    with use_kernels(embeddings="native"):
        tables = arranged([unaligned, *case.tables[1:]])
        out = embeddings(case.ids, case.positions, *tables, PADDING, case.dropout)
    torch.testing.assert_close(out, expected[0], rtol=1e-6, atol=1e-6)
    assert all(error(result, truth.double()) < 1e-6 for result, truth in zip(case.run("native"), expected, strict=True))


def test_tables_of_more_than_two_to_the_31_elements(device):
    """On the host only the rows that are touched cost memory."""
    words, hidden = 2**21 + 8, 1024
    table = torch.from_numpy(np.zeros((words, hidden), dtype=np.int16)).view(torch.bfloat16)
    table = torch.zeros_like(table, device=device) if device.type == "cuda" else table
    table[-1] = torch.randn(hidden)
    norm = Norm(torch.ones(hidden, device=device), torch.zeros(hidden, device=device), EPS)
    zeros = torch.zeros(2, hidden, dtype=torch.bfloat16, device=device)
    ids, positions = torch.tensor([words - 1, 5], device=device), torch.tensor([0, 1], device=device)
    with use_kernels(embeddings="native"):
        out = embeddings(ids, positions, table, zeros, norm, PADDING)
    exact = reference.layer_norm(table[-1].double(), Norm(norm.weight.double(), norm.bias.double(), EPS))
    assert error(out[0], exact) < 2**-8
    assert out[1].abs().amax() == 0.0


def test_opcheck(device):
    case = Case(two_sequences(9, device), 96, p=0.1)
    leaves = [each.requires_grad_() for each in case.tables]
    inputs = (case.ids, case.positions, *leaves, EPS, PADDING, *case.dropout, False, None, PADDING, True, "native")
    torch.library.opcheck(torch.ops.erniem_fast.embeddings.default, inputs)
