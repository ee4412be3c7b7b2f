"""ErnieMModel and its heads: the classes, arguments and outputs of transformers 4.57.6, over the packed encoder."""

import logging
import os
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, gelu, one_hot
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from . import flags, inputs, modes
from .batch import TokenBatch
from .configuration import RESERVED_POSITIONS, ErnieMConfig
from .conversion import paddle
from .encoder import ErnieMEmbeddings, ErnieMEncoder, ErnieMEncoderLayer
from .inference import InferenceModel, inference_module
from .inference_gpu import ScaledLinear
from .quantization import describe
from .vocabulary_loss import vocabulary_losses

_LOG = logging.getLogger(__name__)

IGNORED_LABEL = -100

Model = TypeVar("Model", bound="ErnieMPreTrainedModel")


class ErnieMPooler(nn.Module):
    """tanh of a linear layer, on each sequence's first token."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, first_tokens: Tensor) -> Tensor:
        """`(sequences, hidden)` to the same."""
        return self.activation(self.dense(first_tokens))


class _UnreadPooler(ErnieMPooler):
    """A pooler that is loaded and saved with the checkpoint, but neither run nor trained, because no loss reads it.

    Its weights are buffers, because `DistributedDataParallel` waits for the gradient of every trainable parameter.
    Frozen parameters would not help: `from_pretrained` sets `requires_grad` on all parameters that it loads.
    """

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        for name, parameter in list(self.dense.named_parameters()):
            delattr(self.dense, name)
            self.dense.register_buffer(name, parameter.detach())


class ErnieMPreTrainedModel(InferenceModel, PreTrainedModel):
    """The base of all ERNIE-M models: loading, saving, initialisation, and pruning of heads."""

    config_class = ErnieMConfig
    config: ErnieMConfig
    base_model_prefix = "ernie_m"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = [ErnieMEncoderLayer.__name__, ErnieMEmbeddings.__name__]  # noqa: RUF012 (as the base has it)

    def __init__(self, config: ErnieMConfig, *inputs, **kwargs) -> None:
        super().__init__(config, *inputs, **kwargs)
        config.check()

    @classmethod
    def from_pretrained(
        cls: type[Model], pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs
    ) -> Model:
        """As in transformers; the checkpoint may also be PaddleNLP's or Baidu's, as they published it.

        Raises:
            RefusedPickleError: a `.pdparams` file asks for a function that no checkpoint needs.
            ValueError: a file of Paddle's is damaged or missing, or its config is another model's.
        """
        found = paddle.find_checkpoint(pretrained_model_name_or_path, kwargs)
        if found is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        # transformers takes weights from a state dict only if it is told no checkpoint.
        if kwargs.get("config") is None:
            kwargs["config"] = pretrained_model_name_or_path
        state = paddle.read_checkpoint(found, issubclass(cls, ErnieMForQuestionAnswering))
        loaded = super().from_pretrained(None, *model_args, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded

    def enable_input_require_grads(self) -> None:
        """Lets gradients flow through a frozen model, as adapters under reentrant checkpoints need.

        The hook is on the embeddings' result. transformers would set it on the word table, whenever checkpointing is
        enabled, and the op could not compute the embeddings of a hooked table.
        """
        hook = self.base_model.embeddings.register_forward_hook(lambda module, inputs, hidden: hidden.requires_grad_())
        self._require_grads_hooks = [hook]  # `disable_input_require_grads` removes these

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """`eager`, whatever is asked for, so that code which asks every model for an implementation runs."""
        if requested_attention not in (None, "eager"):
            _LOG.warning(
                "attn_implementation=%r changes nothing in ERNIE-M: the flags of erniem_fast choose the kernels.",
                requested_attention,
            )
        return "eager"

    def save_pretrained(self, *arguments, **options) -> None:
        """As in transformers; int8 weights are saved with their scales, and the config says which weights are int8.

        Raises:
            RuntimeError: the model has the 8-bit weights of a GPU.
        """
        found = inference_module(self)
        if isinstance(found, ScaledLinear):
            raise RuntimeError(
                f"A model with {found.weights} weights on a GPU cannot be saved, because it could not be loaded again; "
                f"call erniem_fast.restore(model) first."
            )
        describe(self.config, self.base_model)
        super().save_pretrained(*arguments, **options)

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Removes attention heads permanently, and records them in the config so that a saved model loads again.

        Args:
            heads_to_prune: the heads to remove, by layer, numbered as in the unpruned model.

        Raises:
            ValueError: the model does not have a layer or head, or a layer would be left without heads; or its weights
                are packed or rounded.
        """
        found = inference_module(self)
        if found is not None:
            raise ValueError(
                f"Heads with {found.weights} weights cannot be removed; call erniem_fast.restore(model) first."
            )
        for layer, heads in heads_to_prune.items():
            self._check_heads(layer, heads)
        for layer, heads in heads_to_prune.items():
            pruned = set(self.config.pruned_heads.get(layer, ())) | set(heads)
            self.config.pruned_heads[layer] = sorted(pruned)
            self.base_model.encoder.layers[layer].self_attn.prune_heads(set(heads))

    def _check_heads(self, layer: int, heads: list[int]) -> None:
        if not 0 <= layer < self.config.num_hidden_layers:
            raise ValueError(
                f"heads_to_prune names layer {layer}; layers are 0 to {self.config.num_hidden_layers - 1}."
            )
        missing = sorted(set(heads) - set(range(self.config.num_attention_heads)))
        if missing:
            raise ValueError(
                f"heads_to_prune names heads {missing} of layer {layer}; heads are 0 to "
                f"{self.config.num_attention_heads - 1}."
            )
        if len(set(heads) | set(self.config.pruned_heads.get(layer, ()))) == self.config.num_attention_heads:
            raise ValueError(f"heads_to_prune leaves layer {layer} without heads; keep at least one.")


class ErnieMModel(ErnieMPreTrainedModel):
    """The encoder of ERNIE-M (Ouyang et al., arXiv 2012.15674), with a pooler unless `add_pooling_layer` is False."""

    def __init__(self, config: ErnieMConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = ErnieMEmbeddings(config)
        self.encoder = ErnieMEncoder(config)
        self.pooler = ErnieMPooler(config) if add_pooling_layer else None
        self._graphs = None  # see `use_graphs`
        for layer, heads in config.pruned_heads.items():
            self.encoder.layers[layer].self_attn.prune_heads(set(heads))
        self.post_init()

    @property
    def longest_sequence(self) -> int:
        """The most tokens of a sequence."""
        return self.config.max_position_embeddings - RESERVED_POSITIONS

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        key_ranges: Tensor | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """Encodes a batch of token sequences.

        Args:
            input_ids: integer `(rows, columns)`; or pass `inputs_embeds`, `(rows, columns, hidden)`.
            position_ids: integer `(rows, columns)` or `(1, columns)`, counted from 0; by default each token's column.
            attention_mask: `(rows, columns)`, 1 for real tokens and 0 for padding, by default 1 wherever `input_ids` is
                not `config.pad_token_id`; or a mask per query, `(rows, columns, columns)` or
                `(rows, 1 or heads, columns, columns)`. A 4-D mask of floating-point numbers is added to the scores.
            head_mask: `(heads,)` or `(layers, heads)`, factors of the heads' results.
            past_key_values, use_cache: refused, because ERNIE-M is an encoder.
            output_hidden_states, output_attentions, return_dict: as in transformers; by default the config's.
            cu_seq_lens_q, max_length_q: for sequences that come packed in one row of `input_ids`: their bounds, integer
                `(sequences + 1,)`, and the longest length, as
                `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them.
            cu_seq_lens_k, max_length_k: ignored; accepted because that collator makes them.
            key_ranges: only for packed input, integer `(tokens, 2)`: each token attends to the tokens of its sequence
                from the first number to before the second, counted within the sequence; by default to all.

        Returns:
            `last_hidden_state` `(rows, columns, hidden)`, zeros at padding in the packed layout; `pooler_output`
            `(sequences, hidden)`, None without a pooler; `hidden_states`, for the embeddings and each layer a tensor
            like `last_hidden_state`, and `attentions`, for each layer `(rows, heads, columns, columns)`, if asked for.

        Raises:
            ValueError: the input cannot be run; the message names the argument, its value and the remedy.
            RuntimeError: a flag asks for an implementation that cannot serve the model's device and dtype.
        """
        if past_key_values is not None or use_cache:
            name, value = ("use_cache", use_cache) if use_cache else ("past_key_values", type(past_key_values).__name__)
            raise ValueError(f"{name}={value} has no meaning in ERNIE-M, which is an encoder; leave it out.")
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with flags.held():
            ready = inputs.prepare(
                config,
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                cu_seq_lens_q,
                max_length_q,
                needs_first=self._pools(),
                vocabulary=getattr(self.embeddings.word_embeddings, "num_embeddings", config.vocab_size),
                key_ranges=key_ranges,
            )
            output = None
            if self._graphs is not None and head_mask is None and not (output_attentions or output_hidden_states):
                output = self._graphs.encode(self, ready)
            if output is None:
                output = self._encode(ready, head_mask, output_attentions, output_hidden_states)
        if _as_dict(config, return_dict):
            return output
        # As in the original, the tuple has a None for a missing pooler.
        extras = [field for field in (output.hidden_states, output.attentions) if field is not None]
        return (output.last_hidden_state, output.pooler_output, *extras)

    def graph_inputs(self, ready: inputs.EncoderInputs) -> dict[str, Tensor] | None:
        """What a graph reads of each token, int64 `(tokens,)`, by name; None if none can serve the call."""
        if ready.input_ids is None or ready.scores_bias is not None:
            return None
        return {"input_ids": ready.input_ids, "positions": ready.positions}

    def encode_packed(
        self, batch: TokenBatch, input_ids: Tensor, positions: Tensor
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encodes tokens that are packed in one row, as a graph does it; arguments as of `graph_inputs`."""
        return self._encode(inputs.EncoderInputs(batch, input_ids, None, positions, None))

    def _encode(
        self,
        ready: inputs.EncoderInputs,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Runs embeddings, layers and pooler on prepared input, and unpacks their results."""
        batch = ready.batch
        embedding_seeds, layer_seeds = self.encoder.seeds(self.embeddings.dropout, batch.columns.device)
        embedded = self.embeddings(batch, ready.input_ids, ready.inputs_embeds, ready.positions, embedding_seeds)
        head_mask = self._head_mask(head_mask, embedded)
        hidden, states, attentions = self.encoder(
            embedded, batch, layer_seeds, head_mask, ready.scores_bias, output_attentions, output_hidden_states
        )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=ready.unpack(hidden),
            pooler_output=self.pooler(batch.first_tokens(hidden)) if self._pools() else None,
            hidden_states=tuple(ready.unpack(state) for state in states) if output_hidden_states else None,
            attentions=tuple(ready.unpack_attention(each) for each in attentions) if output_attentions else None,
        )

    def _pools(self) -> bool:
        return self.pooler is not None and not isinstance(self.pooler, _UnreadPooler)

    def _drops(self) -> bool:
        """Whether a dropout is active."""
        return self.encoder.drops(self.embeddings.dropout)

    def _head_mask(self, head_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        """`(layers, heads)`, with the dtype and device of `hidden`: replicas of `DataParallel` have no parameters."""
        if head_mask is None:
            return None
        shape = (self.config.num_hidden_layers, self.config.num_attention_heads)
        if tuple(head_mask.shape) not in (shape, shape[1:]):
            raise ValueError(f"head_mask has shape {tuple(head_mask.shape)}; it must be {shape[1:]} or {shape}.")
        return head_mask.to(hidden).expand(shape)


class _ErnieMHead(ErnieMPreTrainedModel):
    """A model on top of the encoder, which it owns as `ernie_m`."""

    def __init__(self, config: ErnieMConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ernie_m = ErnieMModel(config, add_pooling_layer=add_pooling_layer)

    def _dropout(self) -> nn.Dropout:
        rate = self.config.classifier_dropout
        return nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)

    def _answer(
        self, return_dict: bool | None, encoded: ModelOutput, output: type[ModelOutput], **fields
    ) -> ModelOutput | tuple:
        """The head's output with the encoder's hidden states and attentions; a tuple if `return_dict` is False."""
        answer = output(**fields, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        return answer if _as_dict(self.config, return_dict) else answer.to_tuple()


class _SpanHead(_ErnieMHead):
    """A model that finds spans, and knows whether its head is one that the checkpoint did not hold."""

    _drawn: dict[str, Tensor] = {}  # noqa: RUF012 (an instance has its own)

    @classmethod
    def from_pretrained(cls, *model_args, output_loading_info: bool = False, **kwargs):
        model, info = super().from_pretrained(*model_args, output_loading_info=True, **kwargs)
        own = dict(model.named_parameters())
        drawn = [name for name in own if name in info["missing_keys"] and not name.startswith("ernie_m.")]
        # Biases begin as zeros, which a trained one may be too. Offloaded weights cannot be compared.
        model._drawn = {
            name: own[name].detach().clone() for name in drawn if modes.has_values(own[name]) and own[name].any()
        }
        return (model, info) if output_loading_info else model

    def untrained_weights(self) -> list[str]:
        """The names of the head's weights that are still as `from_pretrained` drew them."""
        own = {name: weight for name, weight in self.named_parameters() if modes.has_values(weight)}
        return [
            name for name, drawn in self._drawn.items() if name in own and torch.equal(own[name], drawn.to(own[name]))
        ]


class ErnieMForSequenceClassification(_ErnieMHead):
    """A linear classifier or regressor on the pooled output."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.dropout = self._dropout()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        # Set explicitly: transformers derives it from the class name, which fails for subclasses.
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Classifies sequences; arguments as in `ErnieMModel.forward`, and:

        Args:
            labels: integer `(sequences,)`, the class of each sequence, -100 to ignore it; or `(sequences, labels)` of 0
                and 1, if a sequence can have several labels; or `(sequences,)` of numbers, for regression.
                `config.problem_type` says which; if it is None, the labels' dtype and shape and `config.num_labels`
                decide.

        Returns:
            `loss`, a scalar, if labels are given; `logits` `(sequences, labels)`; `hidden_states`, `attentions`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; or a label has the wrong dtype or is not one of the classes.
        """
        encoded = self.ernie_m(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
        )
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None
        if labels is not None:
            inputs.check_tensors(labels=labels)
            if self._takes_classes(labels, logits):
                labels = _as_integers("labels", labels, len(logits))
                check_classes(labels, self.num_labels, _REMEDY)
            else:
                self._check_numbers(labels, logits)
                labels = labels if labels.is_floating_point() else labels.float()
            loss = self.loss_function(labels, logits, self.config)
        return self._answer(return_dict, encoded, SequenceClassifierOutput, loss=loss, logits=logits)

    def _takes_classes(self, labels: Tensor, logits: Tensor) -> bool:
        """Whether each label is one class of several: if it is an integer, and there is not one for every logit."""
        if self.config.problem_type is None:
            return self.num_labels > 1 and not labels.is_floating_point() and labels.shape != logits.shape
        return self.config.problem_type == "single_label_classification"

    def _check_numbers(self, labels: Tensor, logits: Tensor) -> None:
        """Refuses labels that have not a number for each logit: the loss would first keep its guess of their kind."""
        if labels.shape == logits.shape or (self.num_labels == 1 and labels.shape == logits.shape[:1]):
            return
        classes = "" if self.config.problem_type else f"; or integers of shape ({len(logits)},), a class for each text"
        raise ValueError(
            f"labels has dtype {labels.dtype} and shape {tuple(labels.shape)}; with num_labels={self.num_labels} and "
            f"problem_type={self.config.problem_type!r} it must hold numbers of shape {tuple(logits.shape)}{classes}."
        )


class ErnieMForMultipleChoice(_ErnieMHead):
    """Scores each choice by a linear layer on its pooled output."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.dropout = self._dropout()
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultipleChoiceModelOutput | tuple:
        """Scores choices; arguments as in `ErnieMModel.forward` with a dimension of choices after the first, and:

        Args:
            labels: integer `(rows,)`, the right choice of each row, -100 to ignore the row.

        Returns:
            `loss`, a scalar, if labels are given; `logits` `(rows, choices)`; `hidden_states`, `attentions`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; the input has no dimension of choices; or a label has the wrong
                dtype or is not one of the choices.
        """
        inputs.check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        given = inputs_embeds if input_ids is None else input_ids
        dimensions = 4 if input_ids is None else 3
        if given is None or given.dim() != dimensions:
            raise ValueError(
                f"Multiple choice needs input_ids of shape (rows, choices, columns) or inputs_embeds of shape (rows, "
                f"choices, columns, hidden); {'nothing' if given is None else tuple(given.shape)} came."
            )
        encoded = self.ernie_m(
            *(_flatten_choices(each) for each in (input_ids, position_ids, attention_mask)),
            head_mask=head_mask,
            inputs_embeds=_flatten_choices(inputs_embeds),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(-1, given.shape[1])
        loss = None
        if labels is not None:
            labels = _as_integers("labels", labels, len(logits))
            check_classes(labels, given.shape[1], "count the choices of a row from 0")
            loss = cross_entropy(logits, labels)
        return self._answer(return_dict, encoded, MultipleChoiceModelOutput, loss=loss, logits=logits)


class ErnieMForTokenClassification(_ErnieMHead):
    """A linear classifier on every token."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.dropout = self._dropout()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        # Set explicitly: transformers derives it from the class name, which fails for subclasses.
        self.loss_type = "ForTokenClassification"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Classifies tokens; arguments as in `ErnieMModel.forward`, and:

        Args:
            labels: integer `(rows, columns)`, the class of each token, -100 to ignore it. In the packed layout padding
                is ignored too.

        Returns:
            `loss`, a scalar, if labels are given; `logits` `(rows, columns, labels)`; `hidden_states`, `attentions`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; or a label has the wrong shape or dtype, or is not a class.
        """
        encoded = self.ernie_m(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            came_packed = cu_seq_lens_q is not None
            real = None if came_packed else inputs.real_positions(self.config, input_ids, attention_mask)
            _check_labels("labels", labels, logits.shape[:2])
            labels = _as_integers("labels", labels)
            labels = labels if real is None else labels.masked_fill(~real, IGNORED_LABEL)
            check_classes(labels, self.num_labels, _REMEDY)
            loss = self.loss_function(logits, labels, self.config)
        return self._answer(return_dict, encoded, TokenClassifierOutput, loss=loss, logits=logits)


class ErnieMForQuestionAnswering(_SpanHead):
    """Finds the span of an answer: for each token the scores of being its start and its end."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}; question answering scores starts and ends, so set it to 2."
            )
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        # Set explicitly: transformers derives it from the class name, which fails for subclasses.
        self.loss_type = "ForQuestionAnswering"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Scores spans; arguments as in `ErnieMModel.forward`, and:

        Args:
            start_positions, end_positions: integer `(rows,)`, the columns where answers start and end. The loss ignores
                columns beyond the row and, in the packed layout, at padding.

        Returns:
            `loss`, a scalar, if both positions are given; `start_logits` and `end_logits` `(rows, columns)`, in the
            packed layout with the lowest finite value at padding; `hidden_states`, `attentions`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; or positions are not integers.
        """
        encoded = self.ernie_m(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        real = inputs.real_positions(self.config, input_ids, attention_mask)
        start_logits, end_logits = _lowest_at_padding(self.qa_outputs(encoded.last_hidden_state), real).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            columns = [
                _without_padding(_as_integers(name, positions, len(start_logits)), real)
                for name, positions in (("start_positions", start_positions), ("end_positions", end_positions))
            ]
            loss = self.loss_function(start_logits, end_logits, *columns)
        logits = {"start_logits": start_logits.contiguous(), "end_logits": end_logits.contiguous()}
        return self._answer(return_dict, encoded, QuestionAnsweringModelOutput, loss=loss, **logits)


class ErnieMForInformationExtraction(_SpanHead):
    """Universal information extraction (UIE): for each token the logits of being the start and the end of a span."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.ernie_m.pooler = _UnreadPooler(config)
        self.linear_start = nn.Linear(config.hidden_size, 1)
        self.linear_end = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Scores starts and ends of spans; arguments as in `ErnieMModel.forward`, and:

        Args:
            start_positions, end_positions: `(rows, columns)` of 0 and 1; or integer `(rows,)`, one column for each row.
                The loss ignores rows with a column outside of the row and, in the packed layout, padding.

        Returns:
            `loss`, a scalar, if both positions are given; `start_logits` and `end_logits` `(rows, columns)`, in the
            packed layout with the lowest finite value at padding; `hidden_states`, `attentions`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; or positions have another shape.
        """
        encoded = self.ernie_m(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        real = inputs.real_positions(self.config, input_ids, attention_mask)
        start_logits = self.linear_start(encoded.last_hidden_state).squeeze(-1)
        end_logits = self.linear_end(encoded.last_hidden_state).squeeze(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            _check_labels("start_positions", start_positions, start_logits.shape, columns_will_do=True)
            _check_labels("end_positions", end_positions, end_logits.shape, columns_will_do=True)
            losses = [
                _span_loss(logits, positions, real)
                for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
            ]
            loss = sum(losses) / 2
        logits = [_lowest_at_padding(each.unsqueeze(-1), real).squeeze(-1) for each in (start_logits, end_logits)]
        fields = {"loss": loss, "start_logits": logits[0], "end_logits": logits[1]}
        return self._answer(return_dict, encoded, QuestionAnsweringModelOutput, **fields)


class ErnieMLMHead(nn.Module):
    """A linear, gelu, a layer norm, and the word table with a bias: XLM-RoBERTa's head, by its names."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden: Tensor) -> Tensor:
        """`(tokens, hidden)` to the same: all but the product with the word table."""
        return self.layer_norm(gelu(self.dense(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(tokens, hidden)` to logits, `(tokens, vocab_size)`."""
        return self.decoder(self.transform(hidden))

    def losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the tokens' losses, and each token's without gradient; see `vocabulary_losses`.

        A decoder that was replaced or hooked is called, on all tokens at once.
        """
        decoder, transformed = self.decoder, self.transform(hidden)
        if modes.is_plain(decoder, nn.Linear):
            return vocabulary_losses(transformed, decoder.weight, decoder.bias, labels)
        losses = cross_entropy(decoder(transformed).float(), labels, reduction="none")
        return losses.sum(), losses.detach()


class ErnieMForMaskedLM(_ErnieMHead):
    """Predicts masked words, by a head whose last product is with the word table."""

    _tied_weights_keys = {  # noqa: RUF012 (as the base has it)
        "lm_head.decoder.weight": "ernie_m.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    accepts_loss_kwargs = True

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        # So that a checkpoint whose training goes on keeps its pooler.
        self.ernie_m.pooler = _UnreadPooler(config)
        self.lm_head = ErnieMLMHead(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ErnieMLMHead):
            init.zeros_(module.bias)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As in transformers; the bias has its two names too if the word table is not shared.

        Else one of them would be a parameter without gradients, for which `DistributedDataParallel` would wait.
        """
        bias = "lm_head.decoder.bias"
        return {bias: self._tied_weights_keys[bias], **super().get_expanded_tied_weights_keys(all_submodels)}

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value
        self.lm_head.bias = value.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> MaskedLMOutput | tuple:
        """Predicts words; arguments as in `ErnieMModel.forward`, and:

        Args:
            labels: integer `(rows, columns)`, the right word of each token, -100 to ignore it. In the packed layout
                padding is ignored too.
            num_items_in_batch: what the sum of the losses is divided by; by default the number of labels that count.
                `Trainer` passes those of all batches whose gradients it adds up.

        Returns:
            `loss`, a scalar, if labels are given. `logits`: without labels `(rows, columns, vocab_size)`, in the packed
            layout zeros at padding; with labels only those at labels that count, `(labels, vocab_size)`, row by row; in
            training None, because the loss computes them piece by piece. `hidden_states`, `attentions`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; or a label has the wrong shape or dtype, or is not a word.
        """
        encoded = self.ernie_m(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
        )
        hidden = encoded.last_hidden_state
        real = None if cu_seq_lens_q is not None else inputs.real_positions(self.config, input_ids, attention_mask)
        if labels is None:
            return self._answer(return_dict, encoded, MaskedLMOutput, logits=self._logits(hidden, real))
        _check_labels("labels", labels, hidden.shape[:2])
        labels = _as_integers("labels", labels).to(hidden.device)
        labels = labels if real is None else labels.masked_fill(~real, IGNORED_LABEL)
        check_classes(labels, self.config.vocab_size, "check that tokenizer and model belong together")
        counted = labels != IGNORED_LABEL
        hidden, labels = hidden[counted], labels[counted]
        loss = self.lm_head.losses(hidden, labels)[0] / loss_divisor(num_items_in_batch, labels)
        logits = None if self.training else self.lm_head(hidden)
        return self._answer(return_dict, encoded, MaskedLMOutput, loss=loss, logits=logits)

    def _logits(self, hidden: Tensor, real: Tensor | None) -> Tensor:
        """`(rows, columns, hidden)` to `(rows, columns, vocab_size)`, computed for real tokens if these are known."""
        if real is None:
            return self.lm_head(hidden)
        if modes.is_recorded() or not modes.has_values(real):
            return self.lm_head(hidden) * real[..., None]
        real = real.expand(hidden.shape[:2])
        found = self.lm_head(hidden[real])
        return found.new_zeros(*real.shape, found.shape[-1]).masked_scatter(real[..., None], found)


def _as_dict(config: ErnieMConfig, return_dict: bool | None) -> bool:
    return config.return_dict if return_dict is None else return_dict


def _check_labels(name: str, labels: Tensor, shape: torch.Size, columns_will_do: bool = False) -> None:
    inputs.check_tensors(**{name: labels})
    rows, columns = shape
    if labels.shape != shape and not (columns_will_do and labels.shape in ((rows,), (rows, 1))):
        other = f", or ({rows},) with one column a row" if columns_will_do else ""
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; it must be ({rows}, {columns}) like the input{other}."
        )


def _as_integers(name: str, labels: Tensor, rows: int | None = None) -> Tensor:
    """The labels as int64: losses take no other dtype for classes and columns, and the ignored label needs a sign.

    Raises:
        ValueError: they are no integers; or there is not one for each of the rows, if their number is given.
    """
    inputs.check_tensors(**{name: labels})
    if labels.is_floating_point():
        raise ValueError(f"{name} has dtype {labels.dtype}; it must hold integers: convert it by .long().")
    if rows is not None and labels.numel() != rows:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; it must be ({rows},), one for each row of the logits."
        )
    return labels.long()


_REMEDY = "load the model with the num_labels that the data has, or check how its labels are numbered"


def check_classes(labels: Tensor, classes: int, remedy: str) -> None:
    """Refuses labels that are neither a class nor ignored.

    Labels on a GPU are not checked, because that would need a synchronisation; nor are labels without values, or while
    a graph is recorded.
    """
    if modes.is_recorded() or labels.device.type != "cpu" or not modes.has_values(labels):
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED_LABEL)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels{place or ''} is {labels[tuple(place)].item()}, outside [0, {classes}); {remedy}. "
            f"The loss ignores labels that are {IGNORED_LABEL}."
        )


def _flatten_choices(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, 1)


def _lowest_at_padding(logits: Tensor, real: Tensor | None) -> Tensor:
    """`(rows, columns, scores)` with the lowest finite value where `real`, bool `(rows, columns)`, is False."""
    return logits if real is None else logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)


def _without_padding(positions: Tensor, real: Tensor | None) -> Tensor:
    """The positions, with those at padding moved behind the row, where the loss ignores them."""
    if real is None:
        return positions
    columns = real.shape[1]
    positions = positions.squeeze(-1) if positions.dim() > 1 else positions
    real = real.expand(positions.shape[0], columns)
    at_padding = ~real.gather(1, positions.clamp(0, columns - 1)[:, None]).squeeze(1)
    return positions.masked_fill(at_padding, columns)


def _span_loss(logits: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
    """Mean binary cross entropy over `(rows, columns)`, except padding and rows with a column outside of the row."""
    rows, columns = logits.shape
    counted = torch.ones_like(logits, dtype=torch.bool) if real is None else real.expand(rows, columns)
    if positions.shape == logits.shape:
        targets = positions
    else:
        column = positions.reshape(rows).long()
        inside = (column >= 0) & (column < columns)
        targets = one_hot(column.clamp(0, columns - 1), columns)
        counted = counted & inside[:, None]
    losses = binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def loss_divisor(num_items_in_batch: Tensor | float | None, labels: Tensor) -> Tensor | float:
    """What makes a mean of the sum; a batch, or a step of several, without labels has a loss of 0."""
    if not torch.is_tensor(num_items_in_batch):
        return (len(labels) if num_items_in_batch is None else num_items_in_batch) or 1
    return num_items_in_batch.to(labels.device).masked_fill(num_items_in_batch.to(labels.device) == 0, 1)
