"""The cross entropy over a large vocabulary, without the logits of all tokens at once.

PyTorch has such a loss since 2.13 (`torch.nn.functional.linear_cross_entropy` with options), Liger has one for GPUs.
This one serves every version of PyTorch that we support, on every device, and also returns each token's loss.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32: 134 tokens of 250,002 words, enough rows for the products to run at speed


def vocabulary_losses(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden · weightᵀ + bias)[label], for `LOGITS_AT_ONCE` logits at a time.

    The gradients are computed in the forward, while a chunk's logits are at hand, so the backward only scales them. It
    may run once; second derivatives are not supported. Under autocast, products are in its dtype and all else, sums of
    gradients included, in float32.

    Args:
        hidden: `(tokens, features)`, floating point.
        weight: `(words, features)`, the table of the output words.
        bias: `(words,)`.
        labels: int64 `(tokens,)`, the right words.

    Returns:
        The sum of the losses, a scalar in float32 (float64 for float64 operands); and each token's, `(tokens,)`, which
        has no gradient.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    needs = [torch.is_grad_enabled() and each.requires_grad for each in (hidden, weight, bias)]
    with torch.autocast(device, enabled=False):
        return _VocabularyLosses.apply(hidden, weight, bias, labels, dtype, needs)


def chunks(tokens: int, words: int) -> Iterator[slice]:
    """Pieces of the tokens whose logits, `(tokens, words)`, may be in memory at once."""
    size = max(1, LOGITS_AT_ONCE // words)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class _VocabularyLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        x, table = hidden.to(dtype), weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        leaves = (hidden, weight, bias)
        grads = [
            torch.zeros_like(each, dtype=wide) if needed else None for each, needed in zip(leaves, needs, strict=True)
        ]
        for rows in chunks(len(labels), len(table)):
            logits = (x[rows] @ table.T).to(wide).add_(bias)
            of_labels = logits.gather(1, labels[rows, None])
            normaliser = logits.logsumexp(1, keepdim=True)
            losses[rows] = (normaliser - of_labels).squeeze(1)
            if any(needs):
                grad = logits.sub_(normaliser).exp_()
                grad.scatter_add_(1, labels[rows, None], torch.full_like(of_labels, -1.0))
                _add_gradients(grads, grad, x[rows], table, rows)
        ctx.grads = [None if g is None else g.to(each.dtype) for g, each in zip(grads, leaves, strict=True)]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "The loss over the vocabulary was differentiated a second time, but its gradients are given up after "
                "the first; call the model again instead of backward(retain_graph=True)."
            )
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_sum) for grad in grads), None, None, None


def _add_gradients(grads: list[Tensor | None], grad: Tensor, x: Tensor, table: Tensor, rows: slice) -> None:
    """Adds the gradients of a chunk.

    Args:
        grads: those of hidden, weight and bias, None for those that are not needed; they grow.
        grad: `(rows, words)`, the gradient of the chunk's logits.
        x, table: the operands of its product.
        rows: the chunk's place in `hidden`.
    """
    of_hidden, of_weight, of_bias = grads
    narrow = grad.to(table.dtype)
    if of_hidden is not None:
        of_hidden[rows] = narrow @ table
    if of_weight is not None and of_weight.dtype == narrow.dtype:
        of_weight.addmm_(narrow.T, x)
    elif of_weight is not None:
        of_weight += narrow.T @ x
    if of_bias is not None:
        of_bias += grad.sum(0)
