"""The post-LN layer, and a stack of such layers, on a TokenBatch, through three ops and plain matrix products.

The modules that hold the weights have different names in different models; each class of layers says where they are.

In inference, a tensor's memory is reused only if the tensor came from a plain module or an op and goes to one. A tensor
that a hook or any other module receives or returns is not overwritten, because they may keep it.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from . import flags, modes, one_call, ops, processes
from .batch import TokenBatch
from .dropout import Dropout, draw_seeds, drop_features, is_active
from .inference import (
    InferenceEmbedding,
    NativeLinear,
    OnednnBFloat16Linear,
    attends_in_bfloat16,
    is_plain_inference,
    untrainable,
)
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

# The op's names for transformers' activations, by their classes.
_FUSED_ACTIVATIONS = {type(ACT2FN[name]): fused for name, fused in ops.ACTIVATIONS.items()}


class Places(NamedTuple):
    """Where a layer has what it computes with, each the path of an attribute.

    Attributes:
        q, k, v, out, up, down: the linears.
        norm1, norm2: the layer norms after attention and after the feed-forward network.
        activation: a module or a function.
        attention_dropout, dropout1, dropout2: the dropouts of attention's probabilities, and before each layer norm.
        heads, scale: the number of heads, and the factor of the scores.
        activation_dropout: the dropout after the activation; None if there is none.
    """

    q: str
    k: str
    v: str
    out: str
    up: str
    down: str
    norm1: str
    norm2: str
    activation: str
    attention_dropout: str
    dropout1: str
    dropout2: str
    heads: str
    scale: str
    activation_dropout: str | None = None

    @property
    def dropouts(self) -> tuple[str | None, ...]:
        """The dropouts' paths, in the order of `LayerDropouts`."""
        return self.attention_dropout, self.dropout1, self.activation_dropout, self.dropout2

    @property
    def linears(self) -> dict[str, str]:
        """The linears' paths, by name."""
        return dict(zip(_LINEARS, self, strict=False))


_LINEARS = ("q", "k", "v", "out", "up", "down")


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


class PostLNLayer(nn.Module):
    """Attention and a feed-forward network, each with a residual and a layer norm after it.

    Attributes:
        places: where the layer's modules are.
    """

    places: ClassVar[Places]
    prepared: one_call.Prepared | None = None

    def compute(
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
                    whole = one_call.run_with_gradients(self, hidden, batch, dropouts)
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
        """`compute` by modules and ops."""
        attentions, scratch, _ = options
        norm1, norm2 = self._norms()
        x = self._operand(hidden)
        context, probabilities = self.attend(x, batch, dropouts.attention, head_mask, scores_bias, attentions, scratch)
        product = project(self._linears()["out"], context, "add_norm")
        hidden = add_norm(hidden, product, norm1, dropouts.after_attention)
        product = self._feed_forward(self._operand(hidden), dropouts.after_activation, scratch)
        return add_norm(hidden, product, norm2, dropouts.after_feed_forward), probabilities

    def attend(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        dropout: Dropout | None,
        head_mask: Tensor | None = None,
        scores_bias: Tensor | None = None,
        output_attentions: bool = False,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention up to its last linear; arguments and results as those of the function `attend`."""
        linears = self._linears()
        rest = (head_mask, scores_bias, output_attentions, scratch)
        return attend([linears[name] for name in "qkv"], *self._heads(), hidden, batch, dropout, *rest)

    def has_plain_attention(self) -> bool:
        """Whether nothing but the ops and the linears decides what `attend` computes."""
        return not modes.is_exported()

    def present_heads(self) -> Sequence[int] | slice:
        """The heads that are left, numbered as in the unpruned layer."""
        return slice(None)

    def dropouts(self) -> tuple[nn.Module | None, ...]:
        """Those of `LayerDropouts`, each with its own seed; None where there is none."""
        return tuple(None if path is None else _submodule(self, path) for path in self.places.dropouts)

    def _operand(self, hidden: Tensor) -> Tensor:
        """The hidden states as the products take them, in bfloat16 if all linears do: then each is rounded once."""
        linears = self._linears()
        if not isinstance(linears["up"], OnednnBFloat16Linear):
            return hidden
        narrow = all(is_plain_inference(linear, OnednnBFloat16Linear) for linear in linears.values())
        return hidden.bfloat16() if narrow else hidden

    def _feed_forward(self, hidden: Tensor, dropout: Dropout | None, scratch: Scratch | None) -> Product:
        """The layer's second half, up to its layer norm."""
        activation, linears = self._fused_activation(), self._linears()
        up, down = linears["up"], linears["down"]
        if activation is None:
            inner = project(up, hidden)
        else:
            inner = project(up, hidden, "bias_gelu", scratch if is_plain(down, nn.Linear) else None)
        settings = flags.snapshot()

        def activate_and_project(x: Tensor) -> Product:
            with flags.held(settings):
                if activation is None:
                    activated = drop_features(self._activation()(x), dropout)
                else:
                    activated = ops.bias_gelu(inner._replace(x=x), activation, dropout)
                return project(down, activated, "add_norm")

        if torch.is_grad_enabled() and _recomputes_activations():
            # Recomputing stops when it has the input of the second product, which the gradient of that product's weight
            # needs: the product itself does not run again.
            return checkpoint(activate_and_project, inner.x, use_reentrant=False)
        return activate_and_project(inner.x)

    def _activation(self) -> Callable[[Tensor], Tensor]:
        return attrgetter(self.places.activation)(self)

    def _fused_activation(self) -> str | None:
        """The op's name for the activation; None if the op lacks it, or the module was replaced or hooked."""
        activation = self._activation()
        name = _FUSED_ACTIVATIONS.get(type(activation))
        return name if name is not None and is_untouched(activation, type(activation)) else None

    def _linears(self) -> dict[str, nn.Module]:
        return dict(zip(_LINEARS, attrgetter(*self.places[: len(_LINEARS)])(self), strict=True))

    def _norms(self) -> tuple[nn.Module, nn.Module]:
        return attrgetter(self.places.norm1, self.places.norm2)(self)

    def _heads(self) -> tuple[int, float]:
        """The number of heads, and the factor of the scores."""
        return attrgetter(self.places.heads, self.places.scale)(self)

    def native_parameters(self) -> list[tuple[Function, Filled]] | None:
        """The native function that computes such a layer, and its parameters; None if a module has to be called."""
        linears, norms = self._linears(), dict(zip(("norm1", "norm2"), self._norms(), strict=True))
        if not self._has_plain_ops():
            return None
        heads, scale = self._heads()
        rest = heads, scale, self._fused_activation()
        kind = type(linears["up"])
        if issubclass(kind, NativeLinear):
            if not all(is_plain_inference(linear, kind) and linear.packed is not None for linear in linears.values()):
                return None
            operands = {name: linear.operands() for name, linear in linears.items()}
            norms = {name: norm_of(norm) for name, norm in norms.items()}
            function, parameters = packed.LAYERS, packed.layer_parameters(operands, norms, *rest)
        elif self._has_plain_linears() and {linear.weight.dtype for linear in linears.values()} == {torch.float32}:
            function, parameters = native_layer.LAYERS, native_layer.parameters(linears, norms, *rest)
        else:
            return None
        # If heads do not divide the features, `ops.attention` raises the error.
        return None if parameters.structure.projected % heads else [(function, parameters)]

    def kernel_parameters(self) -> list[LayerParameters] | None:
        """What kernels and products compute such a layer with; None if a module has to be called."""
        if not (self._has_plain_ops() and self._has_plain_linears()):
            return None
        heads, scale = self._heads()
        linears = {name: Linear(each.weight, each.bias) for name, each in self._linears().items()}
        norms = [norm_of(norm) for norm in self._norms()]
        widths = {len(linears[name].bias) for name in "qkv"}
        read_by_kernels = [
            *(linear.bias for linear in linears.values()),
            *(part for norm in norms for part in norm[:2]),
        ]
        fit = len(widths) == 1 and widths.pop() % heads == 0
        if not (fit and all(each.is_contiguous() for each in read_by_kernels)):
            return None
        qkv = tuple(linears.pop(name) for name in "qkv")
        return [LayerParameters(qkv, *linears.values(), *norms, heads, scale, self._fused_activation())]

    def _has_plain_ops(self) -> bool:
        """Whether ops compute all between the products: no module was replaced or hooked."""
        return (
            self._fused_activation() is not None
            and self.has_plain_attention()
            and all(is_plain(norm, nn.LayerNorm) and norm.bias is not None for norm in self._norms())
        )

    def _has_plain_linears(self) -> bool:
        """Whether all are plain linears with a bias of the weight's dtype and size."""
        return all(
            is_plain(linear, nn.Linear)
            and linear.bias is not None
            and (linear.bias.dtype, linear.bias.shape) == (linear.weight.dtype, linear.weight.shape[:1])
            for linear in self._linears().values()
        )


class PostLNStack(nn.Module):
    """Layers in turn; they are in the module list `layers_name`.

    Attributes:
        layer_kind: the class of the layers.
        layers_name: the attribute that holds them.
        frozen_as: the form that `optimize` has given the weights, for inference; None if it has left them.
    """

    layer_kind: ClassVar[type[PostLNLayer]]
    layers_name: ClassVar[str]
    frozen_as: str | None = None
    prepared: one_call.Prepared | None = None

    def compute(
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
        if self.frozen_as is not None and torch.is_grad_enabled() and (self.training or hidden.requires_grad):
            raise RuntimeError(untrainable("The model", self.frozen_as))
        processes.model_runs(hidden.device)
        if seeds is head_mask is scores_bias is None and not (output_attentions or output_hidden_states):
            whole = one_call.run(self, hidden, batch)
            if whole is not None:
                return whole, [], []
        states, attentions = [], []
        scratch = scratch_for(hidden, max(3 * self.config.hidden_size, self.config.intermediate_size))
        options = LayerOptions(output_attentions, scratch, flags.snapshot())
        for index, layer in enumerate(self.all_layers()):
            if output_hidden_states:
                states.append(hidden)
            mask = None if head_mask is None else head_mask[index, layer.present_heads()]
            layer_seeds = None if seeds is None else seeds[index]
            hidden, probabilities = layer(hidden, batch, layer_seeds, mask, scores_bias, options)
            if output_attentions:
                attentions.append(probabilities)
        if output_hidden_states:
            states.append(hidden)
        return hidden, states, attentions

    def all_layers(self) -> nn.ModuleList:
        return getattr(self, self.layers_name)

    @classmethod
    def linear_paths(cls, index: int) -> list[str]:
        """Where the stack has the linears of a layer."""
        return [f"{cls.layers_name}.{index}.{path}" for path in cls.layer_kind.places.linears.values()]

    def seeds(self, before: nn.Module, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Dropout seeds of the embeddings and of each layer, int64 `(SEEDS_PER_LAYER,)` and `(layers,
        SEEDS_PER_LAYER)`; None if no dropout is active.

        Args:
            before: the dropout of the embeddings.
            device: of the tokens.
        """
        if not self.drops(before):
            return None, None
        rows = len(self.all_layers()) + 1
        seeds = draw_seeds(rows * SEEDS_PER_LAYER, device).view(rows, SEEDS_PER_LAYER)
        return seeds[0], seeds[1:]

    def drops(self, before: nn.Module) -> bool:
        """Whether a dropout of a layer is active, or the one before them."""
        return any(map(is_active, [before, *(each for layer in self.all_layers() for each in layer.dropouts())]))

    def native_parameters(self) -> list[tuple[Function, Filled]] | None:
        """As a layer's, for all layers in turn; None if one of them has to be called."""
        return self._of_layers(PostLNLayer.native_parameters)

    def kernel_parameters(self) -> list[LayerParameters] | None:
        """As a layer's, for all layers in turn; None if one of them has to be called."""
        return self._of_layers(PostLNLayer.kernel_parameters)

    def _of_layers(self, find: Callable[[PostLNLayer], list | None]) -> list | None:
        layers = self.all_layers()
        if not all(type(layer) is self.layer_kind for layer in layers):
            return None
        found = [find(layer) for layer in layers]
        return None if None in found else list(chain.from_iterable(found))


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path: for the many of a stack, in a fraction of the time that their attributes take."""
    for name in path.split("."):
        module = module._modules[name]
    return module


def attend(
    qkv_linears: Sequence[nn.Module],
    heads: int,
    scale: float,
    hidden: Tensor,
    batch: TokenBatch,
    dropout: Dropout | None,
    head_mask: Tensor | None = None,
    scores_bias: Tensor | None = None,
    output_attentions: bool = False,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The result, `(tokens, heads · head_dim)`, and the probabilities (None unless `output_attentions`)."""
    if modes.is_exported():  # exported graphs would join queries, keys and values only to separate them again
        qkv = [linear(hidden) for linear in qkv_linears]
    else:
        qkv = project_side_by_side(qkv_linears, hidden, scratch)
    narrow, probabilities = attends_in_bfloat16(qkv_linears), None
    if output_attentions or scores_bias is not None:
        # In float32, so that the probabilities are exact, but from the queries, keys and values that attention gets.
        rounded = qkv.bfloat16().to(qkv.dtype) if narrow else qkv
        context, probabilities = ops.attention_with_probabilities(rounded, batch, heads, scale, scores_bias, dropout)
    elif narrow:
        context = ops.attention(qkv.bfloat16(), batch, heads, scale, dropout).to(qkv.dtype)
    else:
        context = ops.attention(qkv, batch, heads, scale, dropout)
    if head_mask is not None:
        # The head mask scales a head's probabilities, and so the head's result.
        context = (context.unflatten(-1, (heads, -1)) * head_mask.view(-1, 1)).flatten(1)
        probabilities = None if probabilities is None else probabilities * head_mask.view(-1, 1, 1)
    return context, probabilities if output_attentions else None


def add_norm(residual: Tensor, product: Product, norm: nn.Module, dropout: Dropout | None = None) -> Tensor:
    """`ops.add_norm` by a layer norm's parameters; a module that is not a plain nn.LayerNorm is called instead."""
    if is_plain(norm, nn.LayerNorm):
        return ops.add_norm(residual, product, norm_of(norm), dropout)
    return norm(residual + drop_features(product.value, dropout))


def norm_of(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def is_plain_table(words: nn.Module, padding_idx: int | None) -> bool:
    """Whether `ops.embeddings` can read a word table: it supports only these values of a table's options."""
    if is_plain_inference(words, InferenceEmbedding):
        return True
    options = ("padding_idx", "max_norm", "scale_grad_by_freq")
    wanted = [padding_idx, None, False]
    return is_plain(words, nn.Embedding) and [getattr(words, name) for name in options] == wanted


def embed_words(words: nn.Module, input_ids: Tensor, batch: TokenBatch, padding_idx: int) -> Tensor:
    """Calls a word table that is replaced or hooked with rows of ids, as other models do, `padding_idx` at padding.

    NEFTune's hook (arXiv 2310.05914), for example, scales its noise by the length of the rows.

    Args:
        words: the table.
        input_ids: int64 `(tokens,)`.
        batch: the tokens.
        padding_idx: the id at padding.

    Returns:
        `(tokens, hidden)`.
    """
    if batch.fills_grid:
        return batch.pack(words(input_ids.unflatten(0, batch.grid)))
    return batch.pack(words(batch.unpack(input_ids - padding_idx) + padding_idx))


def embeddings_dropout(module: nn.Module, batch: TokenBatch, seeds: Tensor | None) -> Dropout | None:
    """The dropout of the embeddings, which draws from the first of their seeds; None if it is not active."""
    return _dropout(module, batch, seeds, 0)


def _dropout(module: nn.Module | None, batch: TokenBatch, seeds: Tensor | None, place: int) -> Dropout | None:
    return batch.dropout(module.p, seeds[place]) if seeds is not None and is_active(module) else None


@torch.compiler.assume_constant_result
def _recomputes_activations() -> bool:
    return flags.read(flags.RECOMPUTE) == "1" and not modes.is_exported()
