"""What the benchmark of the ops measures: each op on real sizes, beside what PyTorch has for the same work."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model.checkpoint import SIZES
from bench.model.jobs import Spec, make_jobs
from bench.roofline import Work
from erniem_fast import ops
from erniem_fast.batch import TokenBatch
from erniem_fast.dropout import Dropout
from erniem_fast.ops import Product
from erniem_fast.ops.choose import choose
from erniem_fast.reference import Norm

P, EPS, PADDING = 0.1, 1e-12, 1
OURS, EAGER = "erniem_fast", "torch eager"

# How many rows of a token an op reads and writes in each step, and how many matrix products of all pairs it takes.
ROWS = {
    "embeddings": {"inference": 2, "forward": 3, "backward": 3},
    "attention": {"inference": 4, "forward": 4, "backward": 8},
    "bias_gelu": {"inference": 2, "forward": 2, "backward": 3},
    "add_norm": {"inference": 3, "forward": 4, "backward": 4},
}
PRODUCTS = {"attention": {"inference": 2, "forward": 2, "backward": 5}}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    Attributes:
        name: what the report calls it.
        forward: the op with a rate of dropout, on tensors that it holds.
        leaves: the tensors that it differentiates by; the gradient of the first one is compared.
        grad: the gradient of the result.
        real: takes the real tokens out of the result and of the first leaf's gradient.
        steps: those that it takes part in.
    """

    name: str
    forward: Callable[[float], Tensor]
    leaves: tuple[Tensor, ...]
    grad: Tensor
    real: Callable[[Tensor], Tensor] = lambda rows: rows
    steps: tuple[str, ...] = ("inference", "forward", "backward")


@dataclasses.dataclass(frozen=True)
class Job:
    """An op at one size.

    Attributes:
        op, size, lengths: names; `lengths` is that of all sequences, or "ragged".
        tokens: real tokens.
        work: the least work of each step.
        contenders: ours first.
        exact: makes the contender that computes in float64 from the same values, to compare the others with.
    """

    op: str
    size: str
    lengths: str
    tokens: int
    work: dict[str, Work]
    contenders: list[Contender]
    exact: Callable[[], Contender]

    @property
    def name(self) -> str:
        return f"{self.op}, {self.size}, {self.lengths}"


def make_job(
    op: str, size: str, lengths: str, tokens: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> Job:
    """The job of an op: one of "embeddings", "attention", "bias_gelu" and "add_norm".

    Args:
        op, size, lengths: as in `Job`; size is a key of `SIZES`.
        tokens: how many, about.
        dtype, device: of the tensors.
        compiled: whether torch.compile takes part, which takes seconds to start.
    """
    torch.compiler.reset()
    batch = make_batch(lengths, tokens, device)

    def make(computed):
        torch.manual_seed(0)
        return MAKERS[op](SIZES[size], batch, Values(device, dtype, computed))

    def exact():
        return _eager(make(torch.float64))

    contenders = make(dtype)
    if compiled:
        eager = _eager(contenders)
        fast = torch.compile(eager.forward, dynamic=False)
        contenders.append(dataclasses.replace(eager, name="torch.compile", forward=fast))
    work = least_work(op, size, batch, dtype)
    return Job(op, size, lengths, batch.tokens, work, contenders, exact)


def least_work(op: str, size: str, batch: TokenBatch, dtype: torch.dtype) -> dict[str, Work]:
    """The least work of each step: rows of tokens that an op reads and writes, and attention's products."""
    settings = SIZES[size]
    features = settings["intermediate_size" if op == "bias_gelu" else "hidden_size"]
    row = batch.tokens * features * dtype.itemsize
    product = 2 * batch.sequences.cu_seqlens.diff().long().square().sum().item() * features
    rows, products = ROWS[op], PRODUCTS.get(op, {})
    return {step: Work(rows[step] * row, products.get(step, 0) * product) for step in rows}


def _eager(contenders):
    return next(each for each in contenders if each.name == EAGER)


def make_batch(lengths: str, tokens: int, device: torch.device) -> TokenBatch:
    """About so many tokens in sequences of one length, or of `lengths` "ragged"."""
    if lengths == "ragged":
        rows = max(1, tokens // 256)
        spec = Spec(rows, "modernbert", rows=rows, rounds=1)
        (job,) = make_jobs([spec], None, vocab_size=100, max_length=512)
        mask = torch.tensor(job.batches[0]["attention_mask"], dtype=torch.bool, device=device)
    else:
        length = min(int(lengths), tokens)
        mask = torch.ones(tokens // length, length, dtype=torch.bool, device=device)
    return TokenBatch.from_mask(mask, keep_first=False)


class Values(NamedTuple):
    """Random values: numbers of `dtype`, in tensors of the dtype that is computed with."""

    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype).to(self.computed)


def dropout_of(batch: TokenBatch, p: float) -> Dropout | None:
    return batch.dropout(p, _seed(batch.columns.device)) if p else None


@functools.cache
def _seed(device):
    """Kept, because the host waits for a GPU when it copies a value there, and what is timed calls `dropout_of`."""
    return torch.tensor([42], device=device)


def _attention(settings, batch, random):
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    head_dim = hidden // heads
    rows, columns = batch.grid
    qkv, grad = random(batch.tokens, 3 * hidden), random(batch.tokens, hidden)
    padded, padded_grad = batch.unpack(qkv).contiguous(), batch.unpack(grad).contiguous()
    full = batch.tokens == rows * columns
    mask = None if full else batch.unpack(torch.ones_like(batch.columns, dtype=torch.bool))[:, None, None, :]

    def ours(p):
        return ops.attention(qkv, batch, heads, head_dim**-0.5, dropout_of(batch, p))

    def heads_of_grid():
        return padded.view(rows, columns, 3, heads, head_dim).permute(2, 0, 3, 1, 4)

    def eager(p):
        query, key, value = heads_of_grid()
        scores = query @ key.transpose(-1, -2) * head_dim**-0.5
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return (F.dropout(scores.softmax(-1), p) @ value).transpose(1, 2).flatten(2)

    def sdpa(p):
        out = F.scaled_dot_product_attention(*heads_of_grid(), attn_mask=mask, dropout_p=p)
        return out.transpose(1, 2).flatten(2)

    return [
        Contender(OURS, ours, (qkv,), grad),
        Contender(EAGER, eager, (padded,), padded_grad, batch.pack),
        Contender("torch SDPA", sdpa, (padded,), padded_grad, batch.pack),
        *_varlen(qkv, grad, batch, heads, head_dim),
        *_designs_of_the_backward(qkv, grad, batch, heads, head_dim),
    ]


def _varlen(qkv, grad, batch, heads, head_dim):
    """PyTorch's attention of packed sequences, where it has it: on CUDA, in halves. It knows no dropout."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    if qkv.device.type == "cuda" and qkv.dtype in (torch.float16, torch.bfloat16):
        cu_seqlens, max_seqlen, *_ = batch.sequences
        where = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

        def varlen(_):
            return varlen_attn(*qkv.view(-1, 3, heads, head_dim).unbind(1), *where).flatten(1)

        yield Contender("varlen_attn (no dropout)", varlen, (qkv,), grad)


def _designs_of_the_backward(qkv, grad, batch, heads, head_dim):
    """Triton's kernels with each design of the backward, so that the report shows which one is faster."""
    if qkv.dtype == torch.float64 or choose("attention", qkv.device, qkv.dtype) != "triton":
        return
    from erniem_fast.kernels import attention
    from erniem_fast.kernels.device import describe

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, p, one_pass):
            ctx.case, ctx.one_pass = (batch.sequences, heads, head_dim**-0.5, dropout_of(batch, p)), one_pass
            out, statistics = attention.forward(qkv, *ctx.case)
            ctx.save_for_backward(out, statistics, qkv)
            return out

        @staticmethod
        def backward(ctx, grad):
            return attention.backward(grad, *ctx.saved_tensors, *ctx.case, one_pass=ctx.one_pass), None, None

    designs = [(False, "two passes")]
    arch, max_seqlen = describe(qkv.device).arch, batch.sequences.max_seqlen
    if attention.one_pass_config(arch, qkv.dtype, head_dim, max_seqlen) is not None:
        designs.append((True, "one pass"))
    for one_pass, name in designs:
        forward = functools.partial(lambda p, one_pass: Attention.apply(qkv, p, one_pass), one_pass=one_pass)
        yield Contender(f"erniem_fast, backward in {name}", forward, (qkv,), grad, steps=("backward",))


def _bias_gelu(settings, batch, random):
    features = settings["intermediate_size"]
    x, bias, grad = random(batch.tokens, features), random(features), random(batch.tokens, features)

    def ours(p):
        return ops.bias_gelu(Product(x, bias), "gelu", dropout_of(batch, p))

    def eager(p):
        return F.dropout(F.gelu(x + bias), p)

    return [Contender(name, call, (x, bias), grad) for name, call in ((OURS, ours), (EAGER, eager))]


def _add_norm(settings, batch, random):
    hidden = settings["hidden_size"]
    residual, x, grad = (random(batch.tokens, hidden) for _ in range(3))
    bias, weight, norm_bias = (random(hidden) for _ in range(3))

    def ours(p):
        return ops.add_norm(residual, Product(x, bias), Norm(weight, norm_bias, EPS), dropout_of(batch, p))

    def eager(p):
        return F.layer_norm(residual + F.dropout(x + bias, p), (hidden,), weight, norm_bias, EPS)

    leaves = (x, residual, bias, weight, norm_bias)
    return [Contender(name, call, leaves, grad) for name, call in ((OURS, ours), (EAGER, eager))]


def _embeddings(settings, batch, random, words=250_002, max_positions=514):
    """The word table's gradient is sparse: a dense one costs as much as writing the table, in any implementation."""
    hidden = settings["hidden_size"]
    word_table, position_table = random(words, hidden), random(max_positions, hidden)
    weight, norm_bias, grad = random(hidden), random(hidden), random(batch.tokens, hidden)
    ids, positions = torch.randint(3, words, (batch.tokens,), device=random.device), batch.columns + 2

    def ours(p):
        norm, tables = Norm(weight, norm_bias, EPS), (word_table, position_table)
        return ops.embeddings(ids, positions, *tables, norm, PADDING, dropout_of(batch, p), sparse=True)

    def eager(p):
        words = F.embedding(ids, word_table, PADDING, sparse=True)
        rows = words + F.embedding(positions, position_table, PADDING)
        return F.dropout(F.layer_norm(rows, (hidden,), weight, norm_bias, EPS), p)

    leaves = (word_table, position_table, weight, norm_bias)
    return [Contender(name, call, leaves, grad) for name, call in ((OURS, ours), (EAGER, eager))]


MAKERS = {
    "embeddings": _embeddings,
    "attention": _attention,
    "bias_gelu": _bias_gelu,
    "add_norm": _add_norm,
}
