"""The four ops, and products of 8-bit numbers, in plain, obvious PyTorch: the oracle of every test, never optimised.

Autograd can differentiate all four. The hand-written backwards are for use inside custom ops, where autograd does not
work, and are tested against autograd. Everything computes in the dtype that the inputs promote to. Only 8-bit numbers,
at the end of this file, are defined in float32, operation by operation, so that kernels can compute the same bits.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Sequences
from .dropout import Dropout, apply_mask, drop_features, dropout_mask


class Norm(NamedTuple):
    """The parameters of a layer norm (Ba et al., arXiv 1607.06450).

    Attributes:
        weight: `(hidden,)`, floating point; multiplied with the normalised rows.
        bias: `(hidden,)`, floating point; added to that product. None for zeros.
        eps: added to the variance before the square root.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float


class NormScale(NamedTuple):
    """The parameters of a layer norm that its backward reads. The bias, which it does not read, is not saved."""

    weight: Tensor
    eps: float


def embeddings(
    ids: Tensor,
    positions: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm: Norm,
    padding_idx: int,
    dropout: Dropout | None = None,
    word_scale: Tensor | None = None,
) -> Tensor:
    """dropout(LN(word_table[ids] + position_table[positions])).

    Args:
        ids, positions: int64 `(tokens,)`, rows of the two tables.
        word_table, position_table: `(vocabulary, hidden)` and `(max_positions, hidden)`.
        norm: the parameters of LN.
        padding_idx: the row of both tables that gets no gradient.
        dropout: the dropout of the result; None for no dropout.
        word_scale: `(vocabulary,)`, factors of the word table's rows if they are int8; otherwise None.

    Returns:
        `(tokens, hidden)`.
    """
    x = word_rows(ids, word_table, padding_idx, word_scale) + F.embedding(positions, position_table, padding_idx)
    return drop_features(layer_norm(x, norm), dropout)


def word_rows(ids: Tensor, table: Tensor, padding_idx: int | None = None, scale: Tensor | None = None) -> Tensor:
    """The rows of a word table, which are int8 if there is a scale for each."""
    rows = F.embedding(ids, table, padding_idx)
    return rows if scale is None else rows * scale[ids].unsqueeze(-1)


def attention(qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None = None) -> Tensor:
    """softmax(Q Kᵀ · scale + key bias) with dropout, times V, within each sequence and the key ranges of its queries.

    A query without keys, because their bias is -inf or its range empty, gives zeros.

    Args:
        qkv: `(tokens, 3 · heads · head_dim)`: a token's queries, then its keys, then its values, of all heads.
        sequences: how tokens are cut into sequences, the key bias and the key ranges.
        heads: number of heads.
        scale: factor of the scores, 1 / √head_dim in ERNIE-M.
        dropout: the dropout of the probabilities; None for no dropout.

    Returns:
        `(tokens, heads · head_dim)`.
    """
    outputs = [qkv.new_zeros(0, qkv.shape[1] // 3)]
    for qkv_of_one, rest in _by_sequence(qkv, sequences, heads, dropout):
        out, _ = attend(*qkv_of_one, scale, *rest)
        outputs.append(out.transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def attention_backward(
    grad: Tensor, qkv: Tensor, sequences: Sequences, heads: int, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """The gradient of `qkv`, given `grad`, the gradient of the result of `attention`."""
    grads = [torch.zeros_like(qkv[:0])]
    lengths = sequences.cu_seqlens.diff().tolist()
    grad_of_each = grad.unflatten(-1, (heads, -1)).transpose(0, 1).split(lengths, dim=1)
    parts = _by_sequence(qkv, sequences, heads, dropout)
    for grad_of_one, (qkv_of_one, rest) in zip(grad_of_each, parts, strict=True):
        out, _ = attend(*qkv_of_one, scale, *rest)
        grads_of_one = attend_backward(grad_of_one, *qkv_of_one, scale, *rest, out)
        grads.append(torch.stack(grads_of_one).permute(2, 0, 1, 3).flatten(1))
    return torch.cat(grads)


def _by_sequence(
    qkv: Tensor, sequences: Sequences, heads: int, dropout: Dropout | None
) -> Iterator[tuple[Tensor, tuple[Tensor | None, Tensor | None, float]]]:
    """For each sequence: `(3, heads, length, head_dim)`, queries, keys, values; and `attend`'s bias to p."""
    for sequence, (start, end) in enumerate(pairwise(sequences.cu_seqlens.tolist())):
        parts = (None if each is None else each[start:end] for each in (sequences.key_bias, sequences.key_ranges))
        mask, p = None, 0.0
        if dropout is not None:
            mask, p = _probabilities_mask(dropout, dropout.columns[start:end], sequence, heads), dropout.p
        yield qkv[start:end].unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3), (scores_bias(*parts), mask, p)


def scores_bias(key_bias: Tensor | None, key_ranges: Tensor | None) -> Tensor | None:
    """What is added to the scaled scores of a sequence, -inf for keys that are not attended to; None for no bias.

    Args:
        key_bias: float32 `(..., keys)`, or None.
        key_ranges: int32 `(..., keys, 2)`, see `Sequences`; or None.

    Returns:
        float32 `(..., 1 or queries, keys)`.
    """
    bias = None if key_bias is None else key_bias.unsqueeze(-2)
    if key_ranges is None:
        return bias
    first, end = key_ranges.unsqueeze(-1).unbind(-2)
    key = torch.arange(key_ranges.shape[-2], device=key_ranges.device)
    return torch.where((key >= first) & (key < end), 0.0 if bias is None else bias, -torch.inf)


def _probabilities_mask(dropout: Dropout, columns: Tensor, sequence: int, heads: int) -> Tensor:
    """The dropout mask, `(heads, queries, keys)`, of a sequence with its tokens in `columns`."""
    head = torch.arange(heads, device=columns.device)[:, None]
    width = int(columns.max()) + 1 if len(columns) else 0
    sequence_ids = torch.full_like(columns, sequence)[None, :]
    return dropout_mask(dropout.seed, dropout.p, width, columns[None, :], sequence_ids, head)[..., columns]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, or of a batch of equally long sequences.

    Everything is computed in `wide(dtype)`, so that nothing overflows if the dtype can hold the result. Only the
    results are rounded to the dtype, and the probabilities, because half-precision matrix products take them so.

    Args:
        query, key, value: `(..., length, head_dim)`.
        scale: factor of the scores.
        bias: added to the scaled scores, broadcastable to `(..., length, length)`; -inf for keys that are not attended
            to. None for no bias.
        dropout_mask: bool `(..., length, length)`, False for probabilities that are dropped; None for no dropout.
        p: probability of dropping.

    Returns:
        The result, `(..., length, head_dim)`; and the probabilities after dropout, `(..., length, length)`.
    """
    probabilities = _rounded(softmax(_scores(query, key, scale, bias)), value.dtype)
    dropped = probabilities if dropout_mask is None else apply_mask(probabilities, dropout_mask, p)
    return (dropped @ value.to(dropped.dtype)).to(value.dtype), dropped.to(value.dtype)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    p: float = 0.0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given `grad`, the gradient of the result of `attend`; rounded as there.

    Given that result, `out`, the mean of the probabilities' gradients is computed as grad · out, as kernels commonly
    do. It is the same sum, but with a larger rounding error if one probability is nearly 1 and the gradients of the
    others cancel.
    """
    dtype = query.dtype
    probabilities = softmax(_scores(query, key, scale, bias))
    grad, query, key, value = (x.to(probabilities.dtype) for x in (grad, query, key, value))
    dropped, grad_probabilities = _rounded(probabilities, dtype), grad @ value.transpose(-1, -2)
    if dropout_mask is not None:
        dropped = apply_mask(dropped, dropout_mask, p)
        grad_probabilities = apply_mask(grad_probabilities, dropout_mask, p)
    terms = grad_probabilities * probabilities if out is None else grad * out
    mean = terms.sum(-1, keepdim=True)
    grad_scores = _rounded(probabilities * (grad_probabilities - mean), dtype)
    grad_query, grad_key = grad_scores @ key * scale, grad_scores.transpose(-1, -2) @ query * scale
    return grad_query.to(dtype), grad_key.to(dtype), (dropped.transpose(-1, -2) @ grad).to(dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of a dtype, in the dtype of x."""
    return x.to(dtype).to(x.dtype)


def _scores(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = query.to(wide(query.dtype)) @ key.to(wide(key.dtype)).transpose(-1, -2) * scale
    return scores if bias is None else scores + bias.to(scores.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None, activation: str, dropout: Dropout | None = None) -> Tensor:
    """dropout(activation(x + bias)).

    Args:
        x: `(tokens, intermediate)`, a matrix product.
        bias: `(intermediate,)`; None if there is none or x includes it.
        activation: `gelu` (exact, with erf), `gelu_tanh` or `relu`.
        dropout: the dropout of the result; None for no dropout.

    Returns:
        `(tokens, intermediate)`.
    """
    x = x if bias is None else x + bias
    return drop_features(activate(x, activation), dropout)


def activate(x: Tensor, activation: str) -> Tensor:
    """`gelu` as defined, x Φ(x) (Hendrycks & Gimpel, arXiv 1606.08415); its approximation `gelu_tanh`; or `relu`."""
    dtype, x = x.dtype, x.to(wide(x.dtype))
    if activation == "gelu":
        y = 0.5 * x * (1.0 + torch.erf(x * 2.0**-0.5))
    elif activation == "gelu_tanh":
        y = 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    else:
        y = torch.relu(x)
    return y.to(dtype)


def activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x, given `grad`, the gradient of `activate(x, activation)`."""
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


def add_norm(residual: Tensor, x: Tensor, bias: Tensor | None, norm: Norm, dropout: Dropout | None = None) -> Tensor:
    """LN(residual + dropout(x + bias)).

    Args:
        residual, x: `(tokens, hidden)`; `x` is a matrix product.
        bias: `(hidden,)`; None if there is none or x includes it.
        norm: the parameters of LN.
        dropout: the dropout of x + bias; None for no dropout.

    Returns:
        `(tokens, hidden)`.
    """
    x = x if bias is None else x + bias
    return layer_norm(residual + drop_features(x, dropout), norm)


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450), with the biased variance."""
    normal, _ = normalise(x.to(wide(x.dtype)), norm.eps)
    scaled = normal * norm.weight
    shifted = scaled if norm.bias is None else scaled + norm.bias
    return shifted.to(torch.promote_types(x.dtype, norm.weight.dtype))


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, given `grad`, the gradient of the result of `layer_norm`."""
    normal, rstd = normalise(x, eps)
    grad_normal = grad * weight
    means = grad_normal.mean(-1, keepdim=True) + normal * (grad_normal * normal).mean(-1, keepdim=True)
    return rstd * (grad_normal - means), (grad * normal).sum(0), grad.sum(0)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows minus their mean, divided by their standard deviation; and the reciprocals of the standard deviations.

    The mean is subtracted twice (Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American
    Statistician 37, 1983). The first mean is rounded, so it is off by some units in its last place, and so are all
    elements of the row after the subtraction. In a row of equal values nothing else is left, and dividing by a standard
    deviation of sqrt(eps) makes it large. The second mean is the mean of these errors. For equal values it is exact,
    because so few units add up without rounding.
    """
    centred = x - x.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for statistics, for functions that overflow, and for sums over tokens: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row that is all -inf gives zeros, in the gradient too."""
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


class QuantisedTokens(NamedTuple):
    """Rows of integers that stand for x ≈ scale · (values - zero).

    Attributes:
        values: int32 `(tokens, features)`, from 0 to the number of levels.
        zero: int32 `(tokens, 1)`, the integer that stands for 0.
        scale: float32 `(tokens, 1)`: 0 for a row of zeros, NaN for a row without a finite range.
    """

    values: Tensor
    zero: Tensor
    scale: Tensor


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a weight to integers from -127 to 127.

    Args:
        weight: floating point `(out_features, in_features)`.

    Returns:
        int8 `(out_features, in_features)`; and the rows' scales, float32 `(out_features,)`: 0 for a row of zeros, NaN
        for a row with NaN or infinity.
    """
    weight = weight.float()
    scale = _scale(F.pad(weight, (0, 1)).abs().amax(-1, keepdim=True), 127)
    values = torch.where(scale > 0, weight / scale, 0.0).round()
    return values.to(torch.int8), scale.squeeze(-1)


def quantise_tokens(x: Tensor, levels: int) -> QuantisedTokens:
    """Rounds each token's row by itself, so that its integers do not depend on other tokens.

    Args:
        x: float32 `(tokens, features)`.
        levels: the largest integer.
    """
    low, high = F.pad(x, (0, 1)).aminmax(dim=-1, keepdim=True)  # the range includes 0
    scale = _scale(high - low, levels)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    zero = torch.where(scale > 0, -low * inverse, 0.0).round()
    values = torch.where(scale > 0, x * inverse, 0.0).round() + zero
    return QuantisedTokens(values.clamp(0, levels).int(), zero.int(), scale)


def _scale(size: Tensor, levels: float) -> Tensor:
    """The width of a level, in float32. Subnormal ones count as 0, because their reciprocals overflow."""
    # On a GPU PyTorch would multiply by the reciprocal of a number, which rounds twice.
    scale = size / torch.full_like(size, levels)
    scale = scale.masked_fill(scale < torch.finfo(scale.dtype).tiny, 0.0)
    return torch.where(size < torch.inf, scale, torch.nan)


def quantised_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, levels: int = 255) -> Tensor:
    """x Wᵀ + bias, where the products are those of integers.

    Args:
        x: float32 `(tokens, in_features)`; a row with NaN or infinity gives a row of NaN.
        weight, weight_scale: as from `quantise_weight`.
        bias: float32 `(out_features,)`, or None.
        levels: see `quantise_tokens`.

    Returns:
        float32 `(tokens, out_features)`.
    """
    tokens = quantise_tokens(x, levels)
    sums = (tokens.values - tokens.zero) @ weight.int().t()
    product = sums.float() * (tokens.scale * weight_scale)
    return product if bias is None else product + bias


# --- Products on GPUs, where 0 stands for 0 in both operands ----------------------------------------------------------


def largest_of(dtype: torch.dtype) -> float:
    """The largest number that rows are scaled to; in int8 its negative is there too."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds each row by itself to 8-bit numbers, so that x ≈ scale · values and the largest one is the dtype's.

    Args:
        x: floating point `(tokens, features)`.
        dtype: int8 or float8_e4m3fn.

    Returns:
        `(tokens, features)` in `dtype`; and the scales, float32 `(tokens, 1)`: 0 for a row of zeros, and NaN for a row
        with NaN or infinity, whose values are zeros, because int8 has neither and float8_e4m3fn no infinity. So all
        products of such a row are NaN.
    """
    x, largest = x.float(), largest_of(dtype)
    scale = _scale(F.pad(x, (0, 1)).abs().amax(-1, keepdim=True), largest)
    values = torch.where(scale > 0, x * (1.0 / scale), 0.0).clamp(-largest, largest)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def dequantise(sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The result of a linear from the products of 8-bit numbers, in the scales' precision until it is rounded.

    Args:
        sums: `(tokens, out_features)`; further rows are left out.
        scale, weight_scale: float32 `(tokens, 1)` and `(out_features,)`.
        bias: floating point `(out_features,)`, or None.
        dtype: of the result.

    Returns:
        `(tokens, out_features)`.
    """
    product = sums[: len(scale)].to(scale.dtype) * (scale * weight_scale)
    return (product if bias is None else product + bias).to(dtype)


def scaled_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, where the rows of x are rounded as those of the weight are.

    In float64 the sums are exact: products of two float8_e4m3fn are multiples of 2^-18, and below 2^18.

    Args:
        x: floating point `(tokens, in_features)`.
        weight, weight_scale: from `quantise`, the scales without their last dimension.
        bias: floating point `(out_features,)`, or None.

    Returns:
        float64 `(tokens, out_features)`.
    """
    values, scale = quantise(x, weight.dtype)
    return dequantise(values.double() @ weight.double().t(), scale.double(), weight_scale, bias, torch.float64)
