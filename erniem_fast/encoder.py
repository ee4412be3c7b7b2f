"""The encoder: embeddings and layers on a TokenBatch, through the four ops and plain matrix products.

The modules have the names and the weights of those in transformers 4.57.6. Layer norms, embeddings and dropouts only
hold parameters and rates; the ops do the work.

In inference, a tensor's memory is reused only if the tensor came from a plain module or an op and goes to one. A tensor
that a hook or any other module receives or returns is not overwritten, because they may keep it.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import prune_linear_layer

from . import flags, modes, one_call, ops
from .batch import TokenBatch
from .configuration import RESERVED_POSITIONS, ErnieMConfig
from .dropout import Dropout, drop_features, is_active
from .inference import InferenceEmbedding, NativeLinear, OnednnBFloat16Linear, is_plain_inference
from .kernel_layers import LayerParameters, Linear
from .kernel_training import LayerDropouts
from .linears import Scratch, project, project_side_by_side, scratch_for
from .modes import is_plain, is_untouched
from .native import layer as native_layer
from .native import packed
from .native.function import Filled, Function
from .ops import Product
from .reference import Norm

SEEDS_PER_LAYER = len(LayerDropouts._fields)


def _dropout(module: nn.Module, batch: TokenBatch, seeds: Tensor | None, place: int) -> Dropout | None:
    return batch.dropout(module.p, seeds[place]) if seeds is not None and is_active(module) else None


def _add_norm(residual: Tensor, product: Product, norm: nn.Module, dropout: Dropout | None = None) -> Tensor:
    """`ops.add_norm` by a layer norm's parameters; a module that is not a plain nn.LayerNorm is called instead."""
    if is_plain(norm, nn.LayerNorm):
        return ops.add_norm(residual, product, _norm_of(norm), dropout)
    return norm(residual + drop_features(product.value, dropout))


def _norm_of(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


@torch.compiler.assume_constant_result
def _recomputes_activations() -> bool:
    return flags.read(flags.RECOMPUTE) == "1" and not modes.is_exported()


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
        dropout = _dropout(self.dropout, batch, seeds, 0)
        words, places, norm = self.word_embeddings, self.position_embeddings, self.layer_norm
        plain = self._is_plain_table(words) and is_plain(places, nn.Embedding) and is_plain(norm, nn.LayerNorm)
        if inputs_embeds is None and plain:
            parameters = (words.weight, places.weight, _norm_of(norm), self.padding_idx, dropout)
            if isinstance(words, InferenceEmbedding):
                words.check_inference(input_ids)
                return ops.embeddings(input_ids, rows, *parameters, word_scale=words.weight_scale)
            return ops.embeddings(input_ids, rows, *parameters, words.sparse)
        positioned = places(rows)
        embedded = self._embed(words, input_ids, batch) if inputs_embeds is None else inputs_embeds.to(positioned.dtype)
        return drop_features(_add_norm(embedded, Product(positioned), norm), dropout)

    def _is_plain_table(self, words: nn.Module) -> bool:
        """Whether the op can read the word table: it supports only these values of a table's options."""
        if is_plain_inference(words, InferenceEmbedding):
            return True
        options = ("padding_idx", "max_norm", "scale_grad_by_freq")
        wanted = [self.padding_idx, None, False]
        return is_plain(words, nn.Embedding) and [getattr(words, name) for name in options] == wanted

    def _embed(self, words: nn.Module, input_ids: Tensor, batch: TokenBatch) -> Tensor:
        """Calls a word table that is replaced or hooked with rows of ids, as other models do, `padding_idx` at padding.

        NEFTune's hook (arXiv 2310.05914), for example, scales its noise by the length of the rows.
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
        dropout: Dropout | None,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The result, `(tokens, heads · head_dim)`, and the probabilities (None unless `output_attentions`)."""
        linears = (self.q_proj, self.k_proj, self.v_proj)
        if modes.is_exported():  # exported graphs would join queries, keys and values only to separate them again
            qkv = [linear(hidden) for linear in linears]
        else:
            qkv = project_side_by_side(linears, hidden, scratch)
        heads, scale = self.num_attention_heads, self.scale
        probabilities = None
        if output_attentions or scores_bias is not None:
            context, probabilities = ops.attention_with_probabilities(qkv, batch, heads, scale, scores_bias, dropout)
        else:
            context = ops.attention(qkv, batch, heads, scale, dropout)
        if head_mask is not None:
            # The head mask scales a head's probabilities, and so the head's result.
            context = (context.unflatten(-1, (heads, -1)) * head_mask.view(-1, 1)).flatten(1)
            probabilities = None if probabilities is None else probabilities * head_mask.view(-1, 1, 1)
        return context, probabilities if output_attentions else None


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


class LayerOptions(NamedTuple):
    """How a forward runs all its layers.

    Attributes:
        output_attentions: whether to return the probabilities.
        scratch: memory that one product after another may use; None to allocate memory for each.
        settings: the flags' values; None for the current ones. With gradient checkpointing a layer runs again in the
            backward, when the flags may have changed.
    """

    output_attentions: bool = False
    scratch: Scratch | None = None
    settings: flags.Settings | None = None


class ErnieMEncoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each with a residual and a layer norm after it (post-LN)."""

    prepared: one_call.Prepared | None = None

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
        options: LayerOptions = LayerOptions(),  # noqa: B008 (immutable)
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the layer.

        Args:
            hidden: `(tokens, hidden)`.
            batch: the tokens.
            seeds: int64 `(SEEDS_PER_LAYER,)`; None if no dropout is active.
            head_mask: `(heads,)`, factors of the heads' results; None for no factors.
            scores_bias: see `ops.attention_with_probabilities`; None for no bias.
            options: how to run.

        Returns:
            The result, `(tokens, hidden)`; and the attention probabilities, None unless `options.output_attentions`.
        """
        with flags.held(options.settings):
            dropouts = LayerDropouts(*(_dropout(each, batch, seeds, i) for i, each in enumerate(self.dropouts())))
            if head_mask is scores_bias is None and not options.output_attentions:
                whole = one_call.run(self, hidden, batch) if seeds is None else None
                if whole is None:
                    op_by_op = partial(self._op_by_op, batch=batch, dropouts=dropouts)
                    whole = one_call.run_with_gradients(self, hidden, batch, dropouts, lambda x: op_by_op(x)[0])
                if whole is not None:
                    return whole, None
            return self._op_by_op(hidden, batch, dropouts, head_mask, scores_bias, options)

    def _op_by_op(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        dropouts: LayerDropouts,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        options: LayerOptions = LayerOptions(),  # noqa: B008 (immutable)
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` by modules and ops."""
        attentions, scratch, _ = options
        attention, out_proj = self.self_attn.self_attn, self.self_attn.out_proj
        x = self._operand(hidden)
        context, probabilities = attention(x, batch, dropouts.attention, head_mask, scores_bias, attentions, scratch)
        hidden = _add_norm(hidden, project(out_proj, context, "add_norm"), self.norm1, dropouts.after_attention)
        product = self._feed_forward(self._operand(hidden), dropouts.after_activation, scratch)
        return _add_norm(hidden, product, self.norm2, dropouts.after_feed_forward), probabilities

    def _operand(self, hidden: Tensor) -> Tensor:
        """The hidden states as the products take them, in bfloat16 if all linears do: then each is rounded once."""
        if not isinstance(self.linear1, OnednnBFloat16Linear):
            return hidden
        narrow = all(is_plain_inference(linear, OnednnBFloat16Linear) for linear in self._linears().values())
        return hidden.bfloat16() if narrow else hidden

    def _feed_forward(self, hidden: Tensor, dropout: Dropout | None, scratch: Scratch | None) -> Product:
        """The layer's second half, up to its layer norm."""
        activation = self._fused_activation()
        if activation is None:
            inner = project(self.linear1, hidden)
        else:
            inner = project(self.linear1, hidden, "bias_gelu", scratch if is_plain(self.linear2, nn.Linear) else None)
        settings = flags.snapshot()

        def activate_and_project(x: Tensor) -> Product:
            with flags.held(settings):
                if activation is None:
                    activated = drop_features(self.activation(x), dropout)
                else:
                    activated = ops.bias_gelu(inner._replace(x=x), activation, dropout)
                return project(self.linear2, activated, "add_norm")

        if torch.is_grad_enabled() and _recomputes_activations():
            # Recomputing stops when it has the input of the second product, which the gradient of that product's weight
            # needs: the product itself does not run again.
            return checkpoint(activate_and_project, inner.x, use_reentrant=False)
        return activate_and_project(inner.x)

    def _fused_activation(self) -> str | None:
        """The op's name for the activation; None if the op lacks it, or the module was replaced or hooked."""
        kind, name = self._own_activation
        return name if is_untouched(self.activation, kind) else None

    def _linears(self) -> dict[str, nn.Module]:
        inner = self.self_attn.self_attn
        attention = {"q": inner.q_proj, "k": inner.k_proj, "v": inner.v_proj, "out": self.self_attn.out_proj}
        return {**attention, "up": self.linear1, "down": self.linear2}

    def native_parameters(self) -> list[tuple[Function, Filled]] | None:
        """The native function that computes such a layer, and its parameters; None if a module has to be called."""
        inner, linears, norms = self.self_attn.self_attn, self._linears(), {"norm1": self.norm1, "norm2": self.norm2}
        if not self._has_plain_ops():
            return None
        rest = inner.num_attention_heads, inner.scale, self._fused_activation()
        kind = type(self.linear1)
        if issubclass(kind, NativeLinear):
            if not all(is_plain_inference(linear, kind) and linear.packed is not None for linear in linears.values()):
                return None
            operands = {name: linear.operands() for name, linear in linears.items()}
            norms = {name: _norm_of(norm) for name, norm in norms.items()}
            function, parameters = packed.LAYERS, packed.layer_parameters(operands, norms, *rest)
        elif self._has_plain_linears() and {linear.weight.dtype for linear in linears.values()} == {torch.float32}:
            function, parameters = native_layer.LAYERS, native_layer.parameters(linears, norms, *rest)
        else:
            return None
        # If heads do not divide the features, `ops.attention` raises the error.
        return None if parameters.structure.projected % inner.num_attention_heads else [(function, parameters)]

    def kernel_parameters(self) -> list[LayerParameters] | None:
        """What kernels and products compute such a layer with; None if a module has to be called."""
        inner = self.self_attn.self_attn
        if not (self._has_plain_ops() and self._has_plain_linears()):
            return None
        linears = {name: Linear(each.weight, each.bias) for name, each in self._linears().items()}
        norms = [_norm_of(norm) for norm in (self.norm1, self.norm2)]
        widths = {len(linears[name].bias) for name in "qkv"}
        read_by_kernels = [
            *(linear.bias for linear in linears.values()),
            *(part for norm in norms for part in norm[:2]),
        ]
        fit = len(widths) == 1 and widths.pop() % inner.num_attention_heads == 0
        if not (fit and all(each.is_contiguous() for each in read_by_kernels)):
            return None
        qkv, rest = tuple(linears.pop(name) for name in "qkv"), (inner.num_attention_heads, inner.scale)
        return [LayerParameters(qkv, *linears.values(), *norms, *rest, self._fused_activation())]

    def _has_plain_ops(self) -> bool:
        """Whether ops compute all between the products: no module was replaced or hooked."""
        norms = (self.norm1, self.norm2)
        return (
            self._fused_activation() is not None
            and is_untouched(self.self_attn.self_attn, ErnieMSelfAttention)
            and all(is_plain(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        )

    def _has_plain_linears(self) -> bool:
        """Whether all are plain linears with a bias of the weight's dtype and size."""
        return all(
            is_plain(linear, nn.Linear)
            and linear.bias is not None
            and (linear.bias.dtype, linear.bias.shape) == (linear.weight.dtype, linear.weight.shape[:1])
            for linear in self._linears().values()
        )

    def dropouts(self) -> tuple[nn.Module, ...]:
        """Those of `LayerDropouts`, each with its own seed."""
        return self.self_attn.self_attn.dropout, self.dropout1, self.dropout, self.dropout2


class ErnieMEncoder(nn.Module):
    """The layers."""

    prepared: one_call.Prepared | None = None

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
            seeds: int64 `(layers, SEEDS_PER_LAYER)`; None if no dropout is active.
            head_mask: `(layers, heads)`; None for no factors.
            scores_bias: as for a layer.
            output_attentions: whether to return all layers' probabilities.
            output_hidden_states: whether to return the embeddings and all layers' results.

        Returns:
            The last layer's result, `(tokens, hidden)`; the embeddings and all layers' results; all layers'
            probabilities. The two lists are empty unless asked for.
        """
        if seeds is head_mask is scores_bias is None and not (output_attentions or output_hidden_states):
            whole = one_call.run(self, hidden, batch)
            if whole is not None:
                return whole, [], []
        states, attentions = [], []
        scratch = scratch_for(hidden, max(3 * self.config.hidden_size, self.config.intermediate_size))
        options = LayerOptions(output_attentions, scratch, flags.snapshot())
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(hidden)
            mask = None if head_mask is None else head_mask[index, layer.self_attn.present_heads()]
            layer_seeds = None if seeds is None else seeds[index]
            hidden, probabilities = layer(hidden, batch, layer_seeds, mask, scores_bias, options)
            if output_attentions:
                attentions.append(probabilities)
        if output_hidden_states:
            states.append(hidden)
        return hidden, states, attentions

    def native_parameters(self) -> list[tuple[Function, Filled]] | None:
        """As a layer's, for all layers in turn; None if one of them has to be called."""
        return self._of_layers(ErnieMEncoderLayer.native_parameters)

    def kernel_parameters(self) -> list[LayerParameters] | None:
        """As a layer's, for all layers in turn; None if one of them has to be called."""
        return self._of_layers(ErnieMEncoderLayer.kernel_parameters)

    def _of_layers(self, find: Callable[[ErnieMEncoderLayer], list | None]) -> list | None:
        if not all(type(layer) is ErnieMEncoderLayer for layer in self.layers):
            return None
        found = [find(layer) for layer in self.layers]
        return None if None in found else list(chain.from_iterable(found))
