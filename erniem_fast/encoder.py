"""The encoder: embeddings and layers on a TokenBatch, through the four ops and plain matrix products.

The modules carry the names and the weights of transformers 4.57.6's. Their layer norms, embeddings and dropouts hold
parameters and rates; the ops do the work.
"""

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import prune_linear_layer

from . import ops
from .batch import TokenBatch
from .configuration import RESERVED_POSITIONS, ErnieMConfig
from .dropout import apply_mask, keep_mask
from .projections import project, project_side_by_side

# The places of a layer where dropout happens, each with a seed of its own.
SEEDS_PER_LAYER = 4
_ATTENTION, _AFTER_ATTENTION, _AFTER_ACTIVATION, _AFTER_FEED_FORWARD = range(SEEDS_PER_LAYER)


def _active(dropout: nn.Dropout, seed: Tensor | None) -> tuple[float, Tensor | None]:
    """The rate and seed with which a module's dropout runs now; no seed where it does nothing."""
    return (dropout.p, seed) if dropout.training and dropout.p > 0.0 else (0.0, None)


class ErnieMEmbeddings(nn.Module):
    """Word plus position embeddings, normalised."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, batch: TokenBatch, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor, seed: Tensor
    ) -> Tensor:
        """
        Args:
            batch: the tokens.
            input_ids: int64 `(tokens,)`, or None with `inputs_embeds`, `(tokens, hidden)`.
            positions: int64 `(tokens,)`, counted from 0.
            seed: int64, one element.

        Returns:
            `(tokens, hidden)`.
        """
        rows = positions + RESERVED_POSITIONS
        norm = (self.layer_norm.weight, self.layer_norm.bias, self.layer_norm.eps)
        p, seed = _active(self.dropout, seed)
        if inputs_embeds is None and type(self.word_embeddings) is nn.Embedding:
            tables = (self.word_embeddings.weight, self.position_embeddings.weight)
            return ops.embeddings(input_ids, rows, *tables, *norm, self.padding_idx, batch, p, seed)
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        normalised = ops.add_layernorm(words, self.position_embeddings(rows), None, *norm, batch)
        if seed is None:
            return normalised
        return apply_mask(normalised, keep_mask(seed, p, self.hidden_size, batch.columns, batch.sequences), p)


class ErnieMSelfAttention(nn.Module):
    """The projections to queries, keys and values, and the attention between them."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.q_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.k_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.v_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        seed: Tensor,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`(tokens, hidden)` to `(tokens, heads · head_dim)`, and the probabilities where they are asked for."""
        qkv = project_side_by_side((self.q_proj, self.k_proj, self.v_proj), hidden)
        heads, scale = self.num_attention_heads, 1.0 / math.sqrt(self.attention_head_size)
        p, seed = _active(self.dropout, seed)
        probabilities = None
        if output_attentions or scores_bias is not None:
            context, probabilities = ops.attention_with_probabilities(qkv, batch, heads, scale, scores_bias, p, seed)
        else:
            context = ops.attention(qkv, batch, heads, scale, p, seed)
        if head_mask is not None:
            # A head's mask scales its probabilities, and so its result.
            context = (context.unflatten(-1, (heads, -1)) * head_mask.view(-1, 1)).flatten(1)
            probabilities = None if probabilities is None else probabilities * head_mask.view(-1, 1, 1)
        return context, probabilities if output_attentions else None


class ErnieMAttention(nn.Module):
    """Self-attention and the projection of its result, whose heads can be pruned."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.self_attn = ErnieMSelfAttention(config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.pruned_heads: set[int] = set()

    def prune_heads(self, heads: set[int]) -> None:
        """Takes heads out for good; they are numbered as in the unpruned layer."""
        inner = self.self_attn
        present = [h for h in range(inner.num_attention_heads + len(self.pruned_heads)) if h not in self.pruned_heads]
        heads = set(heads) & set(present)
        kept = torch.tensor([place for place, head in enumerate(present) if head not in heads], dtype=torch.long)
        size = inner.attention_head_size
        features = (kept[:, None] * size + torch.arange(size)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(inner, name, prune_linear_layer(getattr(inner, name), features))
        self.out_proj = prune_linear_layer(self.out_proj, features, dim=1)
        inner.num_attention_heads = len(kept)
        inner.all_head_size = len(kept) * size
        self.pruned_heads |= heads


class ErnieMEncoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each with a residual and a layer norm after it (post-LN)."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        act_dropout = config.hidden_dropout_prob if config.act_dropout is None else config.act_dropout
        self.self_attn = ErnieMAttention(config)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(act_dropout)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout1 = nn.Dropout(config.hidden_dropout_prob)
        self.dropout2 = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACT2FN[config.hidden_act]
        self._fused_activation = ops.ACTIVATIONS.get(config.hidden_act)

    def forward(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        seeds: Tensor,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`(tokens, hidden)` to the same, and the attention probabilities where they are asked for.

        Args:
            hidden: `(tokens, hidden)`.
            batch: the tokens.
            seeds: int64 `(SEEDS_PER_LAYER,)`.
            head_mask: `(heads,)`, factors of the heads' results.
            scores_bias: see `ops.attention_with_probabilities`.
            output_attentions: whether to return the probabilities.
        """
        attention = (head_mask, scores_bias, output_attentions)
        context, probabilities = self.self_attn.self_attn(hidden, batch, seeds[_ATTENTION], *attention)
        hidden = self._add_norm(
            hidden, context, self.self_attn.out_proj, self.norm1, self.dropout1, batch, seeds[_AFTER_ATTENTION]
        )
        inner = self._activate(hidden, batch, seeds[_AFTER_ACTIVATION])
        hidden = self._add_norm(
            hidden, inner, self.linear2, self.norm2, self.dropout2, batch, seeds[_AFTER_FEED_FORWARD]
        )
        return hidden, probabilities

    def _add_norm(self, residual, x, linear, norm, dropout, batch, seed):
        x, bias = project(linear, x, leave_bias=ops.fuses_bias("layernorm", x))
        return ops.add_layernorm(residual, x, bias, norm.weight, norm.bias, norm.eps, batch, *_active(dropout, seed))

    def _activate(self, hidden, batch, seed):
        p, seed = _active(self.dropout, seed)
        if self._fused_activation is not None:
            x, bias = project(self.linear1, hidden, leave_bias=ops.fuses_bias("bias_gelu", hidden))
            return ops.bias_gelu_dropout(x, bias, self._fused_activation, batch, p, seed)
        activated = self.activation(self.linear1(hidden))
        if seed is None:
            return activated
        return apply_mask(activated, keep_mask(seed, p, activated.shape[-1], batch.columns, batch.sequences), p)


class ErnieMEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([ErnieMEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        seeds: Tensor,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Runs all layers.

        Args:
            hidden: `(tokens, hidden)`, the embeddings.
            batch: the tokens.
            seeds: int64 `(layers, SEEDS_PER_LAYER)`.
            head_mask: `(layers, heads)`, or None.
            scores_bias, output_attentions: as for a layer.
            output_hidden_states: whether to return what goes into the layers and comes out of them.

        Returns:
            The last layer's result, `(tokens, hidden)`; the embeddings and all layers' results; all layers'
            probabilities. The two lists are empty unless asked for.
        """
        states, attentions = [], []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(hidden)
            mask = None if head_mask is None else head_mask[index]
            hidden, probabilities = layer(hidden, batch, seeds[index], mask, scores_bias, output_attentions)
            if output_attentions:
                attentions.append(probabilities)
        if output_hidden_states:
            states.append(hidden)
        return hidden, states, attentions
