"""The four ops in plain, obvious PyTorch: the oracle of every test, never optimised.

All are differentiable by autograd, which the formulas of the backwards are tested against; those serve where autograd
is not to be had, inside a custom op. They compute in the dtype that type promotion gives their inputs. Dropout is off
where `seed` is None; `columns` and `sequences`, int64 `(tokens,)`, are the tokens' coordinates in `dropout.py`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import apply_mask, keep_mask


def embeddings(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    padding_idx: int,
    columns: Tensor,
    sequences: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(LN(word_table[ids] + position_table[positions])).

    Args:
        ids, positions: int64 `(tokens,)`, rows of the two tables.
        word_table, position_table: `(vocabulary, hidden)` and `(max_positions, hidden)`.
        weight, norm_bias: `(hidden,)`, of the layer norm.
        eps: added to the variance.
        padding_idx: the row that gets no gradient, in both tables.
        columns, sequences, p, seed: of the dropout.

    Returns:
        `(tokens, hidden)`.
    """
    x = F.embedding(ids, word_table, padding_idx) + F.embedding(positions, position_table, padding_idx)
    return feature_dropout(layer_norm(x, weight, norm_bias, eps), columns, sequences, p, seed)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    heads: int,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(Q Kᵀ · scale) with dropout, times V, within each sequence and over the keys that are kept.

    A sequence without keys gives zeros.

    Args:
        qkv: `(tokens, 3 · heads · head_dim)`, all queries, then all keys, then all values of a token.
        cu_seqlens: int32 `(sequences + 1,)`, where sequences start and end.
        key_mask: bool `(tokens,)`, False for tokens that nobody attends to, or None.
        heads: number of heads.
        scale: of the scores, 1 / √head_dim in ERNIE-M.
        columns, p, seed: of the dropout of probabilities.

    Returns:
        `(tokens, heads · head_dim)`.
    """
    outputs = [qkv.new_zeros(0, qkv.shape[1] // 3)]
    for sequence, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        query, key, value = qkv[start:end].unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        kept = None if key_mask is None else key_mask[start:end]
        keep = None if seed is None else attention_keep_mask(seed, p, columns[start:end], sequence, heads)
        out, _ = attend(query, key, value, scale, kept, keep, p)
        outputs.append(out.transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    heads: int,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The gradient of `qkv`, given that of the result of `attention`, `(tokens, heads · head_dim)`."""
    of_qkv = [torch.zeros_like(qkv[:0])]
    for sequence, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        query, key, value = qkv[start:end].unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        kept = None if key_mask is None else key_mask[start:end]
        keep = None if seed is None else attention_keep_mask(seed, p, columns[start:end], sequence, heads)
        of_out = grad[start:end].unflatten(-1, (heads, -1)).transpose(0, 1)
        out, _ = attend(query, key, value, scale, kept, keep, p)
        grads = attend_backward(of_out, query, key, value, scale, kept, keep, p, out)
        of_qkv.append(torch.stack(grads).permute(2, 0, 1, 3).flatten(1))
    return torch.cat(of_qkv)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    kept: Tensor | None = None,
    keep: Tensor | None = None,
    p: float = 0.0,
    scores_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, or of a batch of equally long ones.

    Everything is computed in `wide(dtype)`, so that nothing overflows that the result could hold. Rounded to the dtype
    are the results, and what half-precision matrix products take: the probabilities.

    Args:
        query, key, value: `(..., length, head_dim)`.
        scale: of the scores.
        kept: bool, broadcastable to `(..., length, length)`, False for keys that are not attended to.
        keep: bool `(..., length, length)`, the dropout mask.
        p: probability of dropping.
        scores_bias: added to the scaled scores, broadcastable to them.

    Returns:
        `(..., length, head_dim)`, and the probabilities after dropout, `(..., length, length)`.
    """
    probabilities = _rounded(softmax(_scores(query, key, scale, kept, scores_bias)), value.dtype)
    dropped = probabilities if keep is None else apply_mask(probabilities, keep, p)
    return (dropped @ value.to(dropped.dtype)).to(value.dtype), dropped.to(value.dtype)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    kept: Tensor | None = None,
    keep: Tensor | None = None,
    p: float = 0.0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given that of the result of `attend`, and rounded as there.

    With that result, `out`, the mean of the probabilities' gradients is taken as grad · out, as kernels commonly do:
    the same sum, to which rounding adds more where one probability is nearly 1 and the others' gradients cancel.
    """
    dtype = query.dtype
    probabilities = softmax(_scores(query, key, scale, kept, None))
    grad, query, key, value = (each.to(probabilities.dtype) for each in (grad, query, key, value))
    dropped, of_probabilities = _rounded(probabilities, dtype), grad @ value.transpose(-1, -2)
    if keep is not None:
        dropped, of_probabilities = apply_mask(dropped, keep, p), apply_mask(of_probabilities, keep, p)
    terms = of_probabilities * probabilities if out is None else grad * out
    mean = terms.sum(-1, keepdim=True)
    of_scores = _rounded(probabilities * (of_probabilities - mean), dtype)
    of_query, of_key = of_scores @ key * scale, of_scores.transpose(-1, -2) @ query * scale
    return of_query.to(dtype), of_key.to(dtype), (dropped.transpose(-1, -2) @ grad).to(dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of a dtype, in the dtype of x."""
    return x.to(dtype).to(x.dtype)


def _scores(query: Tensor, key: Tensor, scale: float, kept: Tensor | None, scores_bias: Tensor | None) -> Tensor:
    scores = query.to(wide(query.dtype)) @ key.to(wide(key.dtype)).transpose(-1, -2) * scale
    scores = scores if scores_bias is None else scores + scores_bias.to(scores.dtype)
    return scores if kept is None else scores.masked_fill(~kept, -torch.inf)


def bias_gelu_dropout(
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    columns: Tensor,
    sequences: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(activation(x + bias)).

    Args:
        x: `(tokens, intermediate)`, a matrix product without its bias.
        bias: `(intermediate,)`, or None where the product has it already.
        activation: `gelu` (exact, with erf), `gelu_tanh` or `relu`.
        columns, sequences, p, seed: of the dropout.

    Returns:
        `(tokens, intermediate)`.
    """
    x = x if bias is None else x + bias
    return feature_dropout(activate(x, activation), columns, sequences, p, seed)


def activate(x: Tensor, activation: str) -> Tensor:
    """`gelu` by its definition, x Φ(x); `gelu_tanh`, its approximation; `relu`."""
    dtype, x = x.dtype, x.to(wide(x.dtype))
    if activation == "gelu":
        y = 0.5 * x * (1.0 + torch.erf(x * 2.0**-0.5))
    elif activation == "gelu_tanh":
        y = 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    else:
        y = torch.relu(x)
    return y.to(dtype)


def activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x, given that of `activate(x, activation)`."""
    dtype, x = x.dtype, x.to(wide(x.dtype))
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) * (2.0 * torch.pi) ** -0.5
        slope = 0.5 * (1.0 + torch.erf(x * 2.0**-0.5)) + x * density
    elif activation == "gelu_tanh":
        root = (2.0 / torch.pi) ** 0.5
        tanh = torch.tanh(root * (x + 0.044715 * x**3))
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * root * (1.0 + 3 * 0.044715 * x * x)
    else:
        slope = (x > 0).to(x.dtype)
    return (grad * slope).to(dtype)


def add_layernorm(
    residual: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    columns: Tensor,
    sequences: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LN(residual + dropout(x + bias)).

    Args:
        residual, x: `(tokens, hidden)`; `x` is a matrix product without its bias.
        bias: `(hidden,)`, or None where the product has it already.
        weight, norm_bias: `(hidden,)`, of the layer norm.
        eps: added to the variance.
        columns, sequences, p, seed: of the dropout.

    Returns:
        `(tokens, hidden)`.
    """
    x = x if bias is None else x + bias
    return layer_norm(residual + feature_dropout(x, columns, sequences, p, seed), weight, norm_bias, eps)


def layer_norm(x: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450), with the biased variance."""
    normal, _ = normalise(x.to(wide(x.dtype)), eps)
    return (normal * weight + norm_bias).to(torch.promote_types(x.dtype, weight.dtype))


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and norm_bias, given that of the result of `layer_norm`."""
    normal, rstd = normalise(x, eps)
    of_normal = grad * weight
    means = of_normal.mean(-1, keepdim=True) + normal * (of_normal * normal).mean(-1, keepdim=True)
    return rstd * (of_normal - means), (grad * normal).sum(0), grad.sum(0)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows less their mean over their standard deviation, whose reciprocal comes second.

    The mean is taken off twice (Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American
    Statistician 37, 1983). As a rounded number the first is off by some units in its last place, which all of a row's
    elements then have too much. In a row of equal values that is all there is, and the reciprocal of a standard
    deviation of sqrt(eps) blows it up. It is the mean of what is left, and of equal values exactly: few units add up
    without rounding.
    """
    centred = x - x.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, of functions that overflow, and of sums over tokens: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row of nothing but -inf gives zeros, in the gradient too."""
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def feature_dropout(x: Tensor, columns: Tensor, sequences: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of `(tokens, features)`."""
    if seed is None:
        return x
    return apply_mask(x, keep_mask(seed, p, x.shape[-1], columns, sequences), p)


def attention_keep_mask(seed: Tensor, p: float, columns: Tensor, sequence: int, heads: int) -> Tensor:
    """The dropout mask of one sequence's `(heads, queries, keys)`, whose queries and keys stand in `columns`."""
    head = torch.arange(heads, device=columns.device)[:, None]
    width = int(columns.max()) + 1 if len(columns) else 0
    keep = keep_mask(seed, p, width, columns[None, :], torch.full_like(columns, sequence)[None, :], head)
    return keep[..., columns]
