"""The encoder: embeddings and layers on a TokenBatch, through the four ops and plain matrix products.

The modules carry the names and the weights of transformers 4.57.6's. Their layer norms, embeddings and dropouts hold
parameters and rates; the ops do the work.

In inference, a tensor's memory is used again only if the tensor came from a plain module or an op and goes to one. What
a hook or any other module is given or returns stays as it is, because either may keep it.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import prune_linear_layer

from . import flags, modes, ops
from .batch import TokenBatch
from .configuration import RESERVED_POSITIONS, ErnieMConfig
from .native import layer as native_layer
from .ops.native import serves_layers
from .projections import (
    Scratch,
    is_plain,
    is_untouched,
    project,
    project_side_by_side,
    scratch_for,
    takes_few_tokens,
)
from .reference import feature_dropout

# The places of a layer where dropout happens, each with a seed of its own.
SEEDS_PER_LAYER = 4
_ATTENTION, _AFTER_ATTENTION, _AFTER_ACTIVATION, _AFTER_FEED_FORWARD = range(SEEDS_PER_LAYER)


def is_active(dropout: nn.Module) -> bool:
    """Whether a module's dropout drops anything now. (Whoever wants none may have put another module in its place.)"""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0


def _rate_and_seed(dropout: nn.Module, seeds: Tensor | None, place: int) -> tuple[float, Tensor | None]:
    return (dropout.p, seeds[place]) if seeds is not None and is_active(dropout) else (0.0, None)


def _add_norm(
    residual: Tensor,
    x: Tensor,
    bias: Tensor | None,
    norm: nn.Module,
    batch: TokenBatch,
    p: float = 0.0,
    seed: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """`ops.add_layernorm` with a module's layer norm, or the module itself where it is no plain one."""
    if is_plain(norm, nn.LayerNorm):
        return ops.add_layernorm(residual, x, bias, norm.weight, norm.bias, norm.eps, batch, p, seed, overwrite)
    x = x if bias is None else x + bias
    return norm(residual + feature_dropout(x, batch.columns, batch.sequences, p, seed))


def _may_overwrite_product(linear: nn.Module) -> bool:
    """Whether an op may overwrite a linear's product: no gradient needs it, and no hook or other module has seen it."""
    return not torch.is_grad_enabled() and is_plain(linear, nn.Linear)


@torch.compiler.assume_constant_result
def _recomputes_activations() -> bool:
    return flags.read(flags.RECOMPUTE) == "1" and not modes.is_exported()


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
            input_ids: int64 `(tokens,)`, or None with `inputs_embeds`, `(tokens, hidden)`.
            positions: int64 `(tokens,)`, counted from 0.
            seeds: int64, of which the first is used; None where no dropout is active.

        Returns:
            `(tokens, hidden)`.
        """
        rows = positions + RESERVED_POSITIONS
        p, seed = _rate_and_seed(self.dropout, seeds, 0)
        words, places, norm = self.word_embeddings, self.position_embeddings, self.layer_norm
        plain = is_plain(words, nn.Embedding) and is_plain(places, nn.Embedding) and is_plain(norm, nn.LayerNorm)
        # Of a table's options the op knows these values alone.
        options = (words.padding_idx, words.max_norm, words.scale_grad_by_freq) if plain else None
        plain = options == (self.padding_idx, None, False)
        if inputs_embeds is None and plain:
            parameters = (words.weight, places.weight, norm.weight, norm.bias, norm.eps)
            return ops.embeddings(input_ids, rows, *parameters, self.padding_idx, batch, p, seed, words.sparse)
        positioned = places(rows)
        embedded = self._embed(words, input_ids, batch) if inputs_embeds is None else inputs_embeds.to(positioned.dtype)
        normalised = _add_norm(embedded, positioned, None, norm, batch)
        return feature_dropout(normalised, batch.columns, batch.sequences, p, seed)

    def _embed(self, words: nn.Module, input_ids: Tensor, batch: TokenBatch) -> Tensor:
        """By a module that is not ours alone: as in other models it sees rows of ids, `padding_idx` at padding.

        NEFTune's hook (arXiv 2310.05914), for one, adds noise by the length of the rows.
        """
        if batch.fills_grid:
            return batch.pack(words(input_ids.unflatten(0, batch.grid)))
        rows = batch.unpack(input_ids - self.padding_idx) + self.padding_idx
        return batch.pack(words(rows))


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
        seeds: Tensor | None,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(tokens, hidden)` to `(tokens, heads · head_dim)`, and the probabilities where they are asked for."""
        linears = (self.q_proj, self.k_proj, self.v_proj)
        if modes.is_exported():  # where to join them would only be to part them again
            qkv = [linear(hidden) for linear in linears]
        else:
            qkv = project_side_by_side(linears, hidden, scratch)
        heads, scale = self.num_attention_heads, self.scale
        p, seed = _rate_and_seed(self.dropout, seeds, _ATTENTION)
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
        present = self.present_heads()
        heads = set(heads) & set(present)
        kept = torch.tensor([place for place, head in enumerate(present) if head not in heads], dtype=torch.long)
        size = inner.attention_head_size
        features = (kept[:, None] * size + torch.arange(size)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(inner, name, _pruned(getattr(inner, name), features, dim=0))
        self.out_proj = _pruned(self.out_proj, features, dim=1)
        inner.num_attention_heads = len(kept)
        inner.all_head_size = len(kept) * size
        self.pruned_heads |= heads

    def present_heads(self) -> list[int]:
        """The heads that are left, numbered as in the unpruned layer."""
        heads = self.self_attn.num_attention_heads + len(self.pruned_heads)
        return [head for head in range(heads) if head not in self.pruned_heads]


def _pruned(linear: nn.Linear, features: Tensor, dim: int) -> nn.Linear:
    return prune_linear_layer(linear, features, dim=dim).to(linear.weight.dtype)


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
        self._own_activation = type(self.activation), ops.ACTIVATIONS.get(config.hidden_act)

    def forward(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        seeds: Tensor | None,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        scratch: Scratch | None = None,
        settings: flags.Settings | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(tokens, hidden)` to the same, and the attention probabilities where they are asked for.

        Args:
            hidden: `(tokens, hidden)`.
            batch: the tokens.
            seeds: int64 `(SEEDS_PER_LAYER,)`; None where no dropout is active.
            head_mask: `(heads,)`, factors of the heads' results.
            scores_bias: see `ops.attention_with_probabilities`.
            output_attentions: whether to return the probabilities.
            scratch: memory that products may take and that the next one may take again, or None.
            settings: flags to run under, those of now where it is None. A checkpoint runs the layer again in the
                backward, when others may be in force.
        """
        with flags.held(settings):
            if seeds is head_mask is scores_bias is None and not output_attentions and self._is_one_call(hidden):
                return self._one_call(hidden, batch), None
            attention = (head_mask, scores_bias, output_attentions, scratch)
            context, probabilities = self.self_attn.self_attn(hidden, batch, seeds, *attention)
            x, bias = project(self.self_attn.out_proj, context, leave_bias=ops.fuses_bias("layernorm", context))
            dropout = _rate_and_seed(self.dropout1, seeds, _AFTER_ATTENTION)
            overwrite = _may_overwrite_product(self.self_attn.out_proj)
            hidden = _add_norm(hidden, x, bias, self.norm1, batch, *dropout, overwrite)
            dropout = _rate_and_seed(self.dropout, seeds, _AFTER_ACTIVATION)
            x, bias = self._feed_forward(hidden, batch, *dropout, scratch)
            dropout = _rate_and_seed(self.dropout2, seeds, _AFTER_FEED_FORWARD)
            overwrite = _may_overwrite_product(self.linear2)
            return _add_norm(hidden, x, bias, self.norm2, batch, *dropout, overwrite), probabilities

    def _feed_forward(
        self, hidden: Tensor, batch: TokenBatch, p: float, seed: Tensor | None, scratch: Scratch | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `project`: `(tokens, hidden)`, and the bias where that is left to the next op."""
        activation = self._fused_activation()
        fused = activation is not None
        leave_bias = fused and ops.fuses_bias("bias_gelu", hidden)
        between_plain = fused and is_plain(self.linear2, nn.Linear)
        x, bias = project(self.linear1, hidden, leave_bias, scratch if between_plain else None)
        leave_bias = ops.fuses_bias("layernorm", x)
        overwrite = _may_overwrite_product(self.linear1)
        settings = flags.snapshot()

        def activate_and_project(x: Tensor) -> tuple[Tensor, Tensor | None]:
            with flags.held(settings):
                if fused:
                    x = ops.bias_gelu_dropout(x, bias, activation, batch, p, seed, overwrite)
                else:
                    x = feature_dropout(self.activation(x), batch.columns, batch.sequences, p, seed)
                return project(self.linear2, x, leave_bias)

        if torch.is_grad_enabled() and _recomputes_activations():
            # Computing again ends with what the second product keeps for its weight's gradient: it does not run twice.
            return checkpoint(activate_and_project, x, use_reentrant=False)
        return activate_and_project(x)

    def _fused_activation(self) -> str | None:
        """What the op calls the activation; None where it does not know it, or somebody has replaced or hooked it."""
        kind, name = self._own_activation
        return name if is_untouched(self.activation, kind) else None

    def _linears(self) -> dict[str, nn.Module]:
        inner = self.self_attn.self_attn
        attention = {"q": inner.q_proj, "k": inner.k_proj, "v": inner.v_proj, "out": self.self_attn.out_proj}
        return {**attention, "up": self.linear1, "down": self.linear2}

    def _is_one_call(self, hidden: Tensor) -> bool:
        """Whether one native call computes all of the layer: its products and ops, none of them replaced or hooked."""
        if not takes_few_tokens(hidden):
            return False
        inner, linears, norms = self.self_attn.self_attn, self._linears().values(), (self.norm1, self.norm2)
        return (
            self._fused_activation() is not None
            and is_untouched(inner, ErnieMSelfAttention)
            and all(is_plain(linear, nn.Linear) for linear in linears)
            and all(is_plain(norm, nn.LayerNorm) for norm in norms)
            and all(module.bias is not None for module in (*linears, *norms))
            and all(linear.weight.dtype == linear.bias.dtype == hidden.dtype for linear in linears)
            and inner.q_proj.weight.shape[0] % inner.num_attention_heads == 0  # else `ops.attention` says what is wrong
            and serves_layers()
        )

    def _one_call(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        inner = self.self_attn.self_attn
        norms = {"norm1": self.norm1, "norm2": self.norm2}
        heads, scale = inner.num_attention_heads, inner.scale
        return native_layer.forward(hidden, batch, self._linears(), norms, heads, scale, self._fused_activation())

    def dropouts(self) -> tuple[nn.Module, ...]:
        return self.self_attn.self_attn.dropout, self.dropout1, self.dropout, self.dropout2


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
        seeds: Tensor | None,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Runs all layers.

        Args:
            hidden: `(tokens, hidden)`, the embeddings.
            batch: the tokens.
            seeds: int64 `(layers, SEEDS_PER_LAYER)`; None where no dropout is active.
            head_mask: `(layers, heads)`, or None.
            scores_bias, output_attentions: as for a layer.
            output_hidden_states: whether to return what goes into the layers and comes out of them.

        Returns:
            The last layer's result, `(tokens, hidden)`; the embeddings and all layers' results; all layers'
            probabilities. The two lists are empty unless asked for.
        """
        states, attentions = [], []
        scratch = scratch_for(hidden, max(3 * self.config.hidden_size, self.config.intermediate_size))
        settings = flags.snapshot()
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(hidden)
            mask = None if head_mask is None else head_mask[index, layer.self_attn.present_heads()]
            of_layer = None if seeds is None else seeds[index]
            asked = (mask, scores_bias, output_attentions)
            hidden, probabilities = layer(hidden, batch, of_layer, *asked, scratch, settings)
            if output_attentions:
                attentions.append(probabilities)
        if output_hidden_states:
            states.append(hidden)
        return hidden, states, attentions
