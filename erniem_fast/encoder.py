"""ERNIE-M's encoder: the modules and the weights of transformers 4.57.6, on a TokenBatch.

Layer norms, embeddings and dropouts only hold parameters and rates; the ops do the work (`post_ln`).
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
from .dropout import Dropout, drop_features
from .inference import InferenceEmbedding
from .linears import Scratch
from .modes import is_plain, is_untouched
from .ops import Product
from .post_ln import (
    Places,
    PostLNLayer,
    PostLNStack,
    add_norm,
    attend,
    embed_words,
    embeddings_dropout,
    is_plain_table,
    norm_of,
)


class ErnieMEmbeddings(nn.Module):
    """The sum of word and position embeddings, normalised, with dropout."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        batch: TokenBatch,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        positions: Tensor,
        seeds: Tensor | None,
    ) -> Tensor:
        """
        Args:
            batch: the tokens.
            input_ids: int64 `(tokens,)`; None if `inputs_embeds`, `(tokens, hidden)`, is given.
            positions: int64 `(tokens,)`, counted from 0.
            seeds: int64 `(SEEDS_PER_LAYER,)`; only the first is used. None if no dropout is active.

        Returns:
            `(tokens, hidden)`.
        """
        rows = positions + RESERVED_POSITIONS
        dropout = embeddings_dropout(self.dropout, batch, seeds)
        words, places, norm = self.word_embeddings, self.position_embeddings, self.layer_norm
        plain = (
            is_plain_table(words, self.padding_idx) and is_plain(places, nn.Embedding) and is_plain(norm, nn.LayerNorm)
        )
        if inputs_embeds is None and plain:
            parameters = (words.weight, places.weight, norm_of(norm), self.padding_idx, dropout)
            if isinstance(words, InferenceEmbedding):
                words.check_inference(input_ids)
                return ops.embeddings(input_ids, rows, *parameters, word_scale=words.weight_scale)
            return ops.embeddings(input_ids, rows, *parameters, words.sparse)
        positioned = places(rows)
        if inputs_embeds is None:
            embedded = embed_words(words, input_ids, batch, self.padding_idx)
        else:
            embedded = inputs_embeds.to(positioned.dtype)
        return drop_features(add_norm(embedded, Product(positioned), norm), dropout)


class ErnieMSelfAttention(nn.Module):
    """The projections to queries, keys and values, and the attention between them."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.scale = 1.0 / math.sqrt(self.attention_head_size)
        self.q_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.k_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.v_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        dropout: Dropout | None,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The result, `(tokens, heads · head_dim)`, and the probabilities (None unless `output_attentions`)."""
        linears, rest = (self.q_proj, self.k_proj, self.v_proj), (head_mask, scores_bias, output_attentions, scratch)
        return attend(linears, self.num_attention_heads, self.scale, hidden, batch, dropout, *rest)


class ErnieMAttention(nn.Module):
    """Self-attention and the projection of its result, under Hugging Face's names; heads can be pruned.

    It has no forward. The layer calls both, because the op after the projection adds the projection's bias.
    """

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.self_attn = ErnieMSelfAttention(config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.pruned_heads: set[int] = set()

    def prune_heads(self, heads: set[int]) -> None:
        """Removes heads permanently; they are numbered as in the unpruned layer."""
        inner = self.self_attn
        present = self.present_heads()
        heads = set(heads) & set(present)
        left = torch.tensor([index for index, head in enumerate(present) if head not in heads], dtype=torch.long)
        size = inner.attention_head_size
        features = (left[:, None] * size + torch.arange(size)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(inner, name, _pruned(getattr(inner, name), features, dim=0))
        self.out_proj = _pruned(self.out_proj, features, dim=1)
        inner.num_attention_heads = len(left)
        inner.all_head_size = len(left) * size
        self.pruned_heads |= heads

    def present_heads(self) -> list[int]:
        """The heads that are left, numbered as in the unpruned layer."""
        heads = self.self_attn.num_attention_heads + len(self.pruned_heads)
        return [head for head in range(heads) if head not in self.pruned_heads]


def _pruned(linear: nn.Linear, features: Tensor, dim: int) -> nn.Linear:
    return prune_linear_layer(linear, features, dim=dim).to(linear.weight.dtype)


class ErnieMEncoderLayer(PostLNLayer, GradientCheckpointingLayer):
    """Attention and a feed-forward network, each with a residual and a layer norm after it (post-LN)."""

    places = Places(
        q="self_attn.self_attn.q_proj",
        k="self_attn.self_attn.k_proj",
        v="self_attn.self_attn.v_proj",
        out="self_attn.out_proj",
        up="linear1",
        down="linear2",
        norm1="norm1",
        norm2="norm2",
        activation="activation",
        attention_dropout="self_attn.self_attn.dropout",
        dropout1="dropout1",
        dropout2="dropout2",
        heads="self_attn.self_attn.num_attention_heads",
        scale="self_attn.self_attn.scale",
        activation_dropout="dropout",
    )

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

    forward = PostLNLayer.compute

    def attend(self, *arguments: object) -> tuple[Tensor, Tensor | None]:
        """By a call of the module, which may be hooked or replaced."""
        return self.self_attn.self_attn(*arguments)

    def has_plain_attention(self) -> bool:
        return is_untouched(self.self_attn.self_attn, ErnieMSelfAttention)

    def present_heads(self) -> list[int]:
        return self.self_attn.present_heads()


class ErnieMEncoder(PostLNStack):
    """The layers."""

    layer_kind = ErnieMEncoderLayer
    layers_name = "layers"

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([ErnieMEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    forward = PostLNStack.compute
