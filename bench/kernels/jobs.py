"""What the benchmark of the ops measures: each op on real sizes, beside what PyTorch has for the same work."""

import dataclasses
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model.checkpoint import SIZES
from bench.model.jobs import Spec, make_jobs
from bench.roofline import Work
from erniem_fast import ops
from erniem_fast.batch import TokenBatch
from erniem_fast.ops.implementation import choose

P, EPS, PADDING = 0.1, 1e-12, 1
OURS = "erniem_fast"


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
    """

    op: str
    size: str
    lengths: str
    tokens: int
    work: dict[str, Work]
    contenders: list[Contender]

    @property
    def name(self) -> str:
        return f"{self.op}, {self.size}, {self.lengths}"


def make_job(
    op: str, size: str, lengths: str, tokens: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> Job:
    """The job of an op: one of "embeddings", "attention", "bias_gelu" and "layernorm".

    Args:
        op, size, lengths: as in `Job`; size is a key of `SIZES`.
        tokens: how many, about.
        dtype, device: of the tensors.
        compiled: whether torch.compile takes part, which takes seconds to start.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    settings = SIZES[size]
    batch = _batch(lengths, tokens, device)
    work, contenders = MAKERS[op](settings, batch, dtype)
    if compiled:
        eager = next(each for each in contenders if each.name == "torch eager")
        fast = torch.compile(eager.forward, dynamic=False)
        contenders.append(dataclasses.replace(eager, name="torch.compile", forward=fast))
    return Job(op, size, lengths, batch.tokens, work, contenders)


def _batch(lengths, tokens, device):
    if lengths == "ragged":
        rows = max(1, tokens // 256)
        spec = Spec(rows, "modernbert", rows=rows, rounds=1)
        (job,) = make_jobs([spec], None, vocab_size=100, max_length=512)
        mask = torch.tensor(job.batches[0]["attention_mask"], dtype=torch.bool, device=device)
    else:
        length = min(int(lengths), tokens)
        mask = torch.ones(tokens // length, length, dtype=torch.bool, device=device)
    return TokenBatch.from_mask(mask, keep_first=False)[0]


def _random(device, dtype):
    return lambda *shape: torch.randn(shape, device=device).to(dtype)


def _seed(batch, p):
    return torch.tensor([42], device=batch.columns.device) if p else None


def _attention(settings, batch, dtype):
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    head_dim = hidden // heads
    device, (rows, columns) = batch.columns.device, batch.grid
    random = _random(device, dtype)
    qkv, grad = random(batch.tokens, 3 * hidden), random(batch.tokens, hidden)
    padded, padded_grad = batch.unpack(qkv).contiguous(), batch.unpack(grad).contiguous()
    full = batch.tokens == rows * columns
    mask = None if full else batch.unpack(torch.ones_like(batch.columns, dtype=torch.bool))[:, None, None, :]

    def ours(p, qkv=qkv):
        return ops.attention(qkv, batch, heads, head_dim**-0.5, p, _seed(batch, p))

    def heads_of_grid():
        return padded.view(rows, columns, 3, heads, head_dim).permute(2, 0, 3, 1, 4)

    def eager(p):
        query, key, value = heads_of_grid()
        scores = query @ key.transpose(-1, -2) * head_dim**-0.5
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(dtype).min)
        return (F.dropout(scores.softmax(-1), p) @ value).transpose(1, 2).flatten(2)

    def sdpa(p):
        out = F.scaled_dot_product_attention(*heads_of_grid(), attn_mask=mask, dropout_p=p)
        return out.transpose(1, 2).flatten(2)

    contenders = [
        Contender(OURS, ours, (qkv,), grad),
        Contender("torch eager", eager, (padded,), padded_grad, batch.pack),
        Contender("torch SDPA", sdpa, (padded,), padded_grad, batch.pack),
        *_varlen(qkv, grad, batch, heads, head_dim),
        *_other_design(ours, qkv, grad),
    ]
    row = batch.tokens * hidden * dtype.itemsize
    product = 2 * batch.cu_seqlens.diff().long().square().sum().item() * hidden
    forward = Work(4 * row, 2 * product)
    return {"inference": forward, "forward": forward, "backward": Work(8 * row, 5 * product)}, contenders


def _varlen(qkv, grad, batch, heads, head_dim):
    """PyTorch's attention of packed sequences, where it has it: on CUDA, in halves. It knows no dropout."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    if qkv.device.type == "cuda" and qkv.dtype in (torch.float16, torch.bfloat16):
        where = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)

        def varlen(_):
            return varlen_attn(*qkv.view(-1, 3, heads, head_dim).unbind(1), *where).flatten(1)

        yield Contender("varlen_attn (no dropout)", varlen, (qkv,), grad)


def _other_design(ours, qkv, grad):
    """Ours, with the design of the backward that it does not take, where that is a matter of Triton's kernels."""
    if choose("attention", qkv.device, qkv.dtype) != "triton":
        return
    from erniem_fast.kernels import attention

    takes_one_pass = attention.takes_one_pass

    class OtherDesign(torch.autograd.Function):
        """Nothing, but for what runs in its backward: all of it while the choice is turned round."""

        @staticmethod
        def forward(ctx, x, p):
            with torch.enable_grad():
                ctx.x = x.detach().requires_grad_()
                ctx.out = ours(p, ctx.x)
            return ctx.out.detach()

        @staticmethod
        def backward(ctx, grad):
            with mock.patch.object(attention, "takes_one_pass", lambda *case: not takes_one_pass(*case)):
                return *torch.autograd.grad(ctx.out, ctx.x, grad, retain_graph=True), None

    def forward(p):
        return OtherDesign.apply(qkv, p)

    yield Contender("erniem_fast, backward's other design", forward, (qkv,), grad, steps=("backward",))


def _bias_gelu(settings, batch, dtype):
    random = _random(batch.columns.device, dtype)
    features = settings["intermediate_size"]
    x, bias, grad = random(batch.tokens, features), random(features), random(batch.tokens, features)

    def ours(p):
        return ops.bias_gelu_dropout(x, bias, "gelu", batch, p, _seed(batch, p))

    def eager(p):
        return F.dropout(F.gelu(x + bias), p)

    contenders = [Contender(name, call, (x, bias), grad) for name, call in ((OURS, ours), ("torch eager", eager))]
    row = batch.tokens * features * dtype.itemsize
    return {"inference": Work(2 * row), "forward": Work(2 * row), "backward": Work(3 * row)}, contenders


def _layernorm(settings, batch, dtype):
    random = _random(batch.columns.device, dtype)
    hidden = settings["hidden_size"]
    residual, x, grad = (random(batch.tokens, hidden) for _ in range(3))
    bias, weight, norm_bias = (random(hidden) for _ in range(3))

    def ours(p):
        return ops.add_layernorm(residual, x, bias, weight, norm_bias, EPS, batch, p, _seed(batch, p))

    def eager(p):
        return F.layer_norm(residual + F.dropout(x + bias, p), (hidden,), weight, norm_bias, EPS)

    leaves = (x, residual, bias, weight, norm_bias)
    contenders = [Contender(name, call, leaves, grad) for name, call in ((OURS, ours), ("torch eager", eager))]
    row = batch.tokens * hidden * dtype.itemsize
    return {"inference": Work(3 * row), "forward": Work(4 * row), "backward": Work(4 * row)}, contenders


def _embeddings(settings, batch, dtype, words=250_002, max_positions=514):
    """The word table's gradient is sparse: a dense one costs as much as writing the table, in any implementation."""
    device, hidden = batch.columns.device, settings["hidden_size"]
    random = _random(device, dtype)
    word_table, position_table = random(words, hidden), random(max_positions, hidden)
    weight, norm_bias, grad = random(hidden), random(hidden), random(batch.tokens, hidden)
    ids, positions = torch.randint(3, words, (batch.tokens,), device=device), batch.columns + 2

    def ours(p):
        norm = (weight, norm_bias, EPS)
        dropout = (p, _seed(batch, p))
        return ops.embeddings(ids, positions, word_table, position_table, *norm, PADDING, batch, *dropout, sparse=True)

    def eager(p):
        words = F.embedding(ids, word_table, PADDING, sparse=True)
        rows = words + F.embedding(positions, position_table, PADDING)
        return F.dropout(F.layer_norm(rows, (hidden,), weight, norm_bias, EPS), p)

    leaves = (weight, norm_bias, position_table, word_table)
    contenders = [Contender(name, call, leaves, grad) for name, call in ((OURS, ours), ("torch eager", eager))]
    row = batch.tokens * hidden * dtype.itemsize
    return {"inference": Work(2 * row), "forward": Work(3 * row), "backward": Work(3 * row)}, contenders


MAKERS = {
    "embeddings": _embeddings,
    "attention": _attention,
    "bias_gelu": _bias_gelu,
    "layernorm": _layernorm,
}
