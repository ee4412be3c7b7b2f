"""ErnieMModel and its heads: the classes, arguments and outputs of transformers 4.57.6, over the packed encoder."""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from . import flags, inputs, modes
from .configuration import ErnieMConfig
from .dropout import draw_seeds
from .encoder import SEEDS_PER_LAYER, ErnieMEmbeddings, ErnieMEncoder, ErnieMEncoderLayer, is_active

IGNORED_LABEL = -100


class ErnieMPooler(nn.Module):
    """tanh of a linear layer on each sequence's first token."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, first_tokens: Tensor) -> Tensor:
        """`(sequences, hidden)` to the same."""
        return self.activation(self.dense(first_tokens))


class _UnreadPooler(ErnieMPooler):
    """A pooler that no loss reads: loaded and saved with the checkpoint, but neither run nor trained.

    Its weights are buffers, because `DistributedDataParallel` waits for the gradient of every parameter to train.
    Frozen parameters would not do: `from_pretrained` sets `requires_grad` on all that it loads.
    """

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        for name, parameter in list(self.dense.named_parameters()):
            delattr(self.dense, name)
            self.dense.register_buffer(name, parameter.detach())


class ErnieMPreTrainedModel(PreTrainedModel):
    """What ERNIE-M models share: loading, saving, initialisation, and the pruning of heads."""

    config_class = ErnieMConfig
    config: ErnieMConfig
    base_model_prefix = "ernie_m"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = [ErnieMEncoderLayer.__name__, ErnieMEmbeddings.__name__]  # noqa: RUF012 (as the base has it)

    def __init__(self, config: ErnieMConfig, *inputs, **kwargs) -> None:
        super().__init__(config, *inputs, **kwargs)
        config.check()

    def enable_input_require_grads(self) -> None:
        """Lets gradients flow through a frozen model, as adapters under reentrant checkpoints need it.

        By a hook on the embeddings' result: one on the word table, as transformers sets it whenever checkpointing is
        enabled, would take the embeddings' op apart.
        """
        hook = self.base_model.embeddings.register_forward_hook(lambda module, inputs, hidden: hidden.requires_grad_())
        self._require_grads_hooks = [hook]  # what `disable_input_require_grads` takes away

    def prune_heads(self, heads_to_prune: dict[int, list[int]]) -> None:
        """Takes attention heads out for good, and notes them in the config so that a saved model loads again.

        Args:
            heads_to_prune: the heads to take out, by layer, numbered as in the unpruned model.

        Raises:
            ValueError: a layer or head that the model does not have.
        """
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
    """The encoder, with a pooler on top unless `add_pooling_layer` is False."""

    def __init__(self, config: ErnieMConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = ErnieMEmbeddings(config)
        self.encoder = ErnieMEncoder(config)
        self.pooler = ErnieMPooler(config) if add_pooling_layer else None
        for layer, heads in config.pruned_heads.items():
            self.encoder.layers[layer].self_attn.prune_heads(set(heads))
        self.post_init()

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
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """Encodes a batch of token sequences.

        Args:
            input_ids: integer `(rows, columns)`; or pass `inputs_embeds`, `(rows, columns, hidden)`.
            position_ids: integer `(rows, columns)` or `(1, columns)`, counted from 0; columns by default.
            attention_mask: 1 for real tokens and 0 for padding, `(rows, columns)`, by default wherever `input_ids` is
                not `config.pad_token_id`; or a mask per query, `(rows, columns, columns)` or
                `(rows, 1 or heads, columns, columns)`, of which a 4-D one of floats is added to the scores.
            head_mask: `(heads,)` or `(layers, heads)`, factors of the heads' results.
            past_key_values, use_cache: refused; ERNIE-M is an encoder.
            output_hidden_states, output_attentions, return_dict: as in transformers; the config's by default.
            cu_seq_lens_q, max_length_q: bounds and longest length of sequences that come packed in one row of
                `input_ids`, as `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them.
            cu_seq_lens_k, max_length_k: accepted because that collator makes them; self-attention has no use for them.

        Returns:
            `last_hidden_state` `(rows, columns, hidden)`, zeros at padding in the packed layout; `pooler_output`
            `(sequences, hidden)`; `hidden_states` and `attentions` if asked for.

        Raises:
            ValueError: an input that cannot be run; the message names the argument, its value and the remedy.
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
            )
            output = self._encode(ready, head_mask, output_attentions, output_hidden_states)
        if _as_dict(config, return_dict):
            return output
        # The original's tuple keeps a place for the pooler where there is none.
        extras = [each for each in (output.hidden_states, output.attentions) if each is not None]
        return (output.last_hidden_state, output.pooler_output, *extras)

    def _encode(
        self,
        ready: inputs.EncoderInputs,
        head_mask: Tensor | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """The walk from prepared input to the unpacked output."""
        batch = ready.batch
        seeds = self._seeds(batch.columns.device)
        of_embeddings, of_layers = (None, None) if seeds is None else (seeds[0], seeds[1:])
        embedded = self.embeddings(batch, ready.input_ids, ready.inputs_embeds, ready.positions, of_embeddings)
        head_mask = self._head_mask(head_mask, embedded)
        hidden, states, attentions = self.encoder(
            embedded, batch, of_layers, head_mask, ready.scores_bias, output_attentions, output_hidden_states
        )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=batch.unpack(hidden),
            pooler_output=self.pooler(batch.first_tokens(hidden)) if self._pools() else None,
            hidden_states=tuple(batch.unpack(state) for state in states) if output_hidden_states else None,
            attentions=tuple(batch.unpack_attention(each) for each in attentions) if output_attentions else None,
        )

    def _pools(self) -> bool:
        return self.pooler is not None and not isinstance(self.pooler, _UnreadPooler)

    def _seeds(self, device: torch.device) -> Tensor | None:
        """A row of dropout seeds for the embeddings and one for each layer, where any dropout is active."""
        places = [self.embeddings.dropout, *(place for layer in self.encoder.layers for place in layer.dropouts())]
        if not any(is_active(place) for place in places):
            return None
        rows = len(self.encoder.layers) + 1
        return draw_seeds(rows * SEEDS_PER_LAYER, device).view(rows, SEEDS_PER_LAYER)

    def _head_mask(self, head_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        """`(layers, heads)` with dtype and device of `hidden`; replicas of `DataParallel` have no parameters to ask."""
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
        """The head's output with what else the encoder returned, as a tuple where that is asked for."""
        answer = output(**fields, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        return answer if _as_dict(self.config, return_dict) else answer.to_tuple()


class ErnieMForSequenceClassification(_ErnieMHead):
    """A linear classifier or regressor on the pooled output."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.dropout = self._dropout()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type = "ForSequenceClassification"  # also of subclasses, whose names say nothing
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
            labels: integer `(sequences,)` for one label of several, -100 where there is none; `(sequences, labels)` of
                0 and 1 for several at once; `(sequences,)` for regression. `config.problem_type` decides, or else what
                is given.

        Returns:
            `loss` if labels are given, `logits` `(sequences, labels)`, `hidden_states`, `attentions`.
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
            if self._takes_classes(labels, logits):
                labels = _as_integers("labels", labels)
                _check_classes(labels, self.num_labels, _REMEDY)
            elif not labels.is_floating_point():
                labels = labels.float()
            loss = self.loss_function(labels, logits, self.config)
        return self._answer(return_dict, encoded, SequenceClassifierOutput, loss=loss, logits=logits)

    def _takes_classes(self, labels: Tensor, logits: Tensor) -> bool:
        """Whether each label is one class of several: integers are, unless there is one for every logit."""
        if self.config.problem_type is None:
            return self.num_labels > 1 and not labels.is_floating_point() and labels.shape != logits.shape
        return self.config.problem_type == "single_label_classification"


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
            labels: integer `(rows,)`, the right choice of each row, -100 where there is none.

        Returns:
            `loss` if labels are given, `logits` `(rows, choices)`, `hidden_states`, `attentions`.
        """
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
            labels = _as_integers("labels", labels)
            _check_classes(labels, given.shape[1], "count the choices of a row from 0")
            loss = cross_entropy(logits, labels)
        return self._answer(return_dict, encoded, MultipleChoiceModelOutput, loss=loss, logits=logits)


class ErnieMForTokenClassification(_ErnieMHead):
    """A linear classifier on every token."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.dropout = self._dropout()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type = "ForTokenClassification"  # also of subclasses, whose names say nothing
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
            labels: integer `(rows, columns)`, -100 where there is none; padding is left out in the packed layout.

        Returns:
            `loss` if labels are given, `logits` `(rows, columns, labels)`, `hidden_states`, `attentions`.
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
            _check_classes(labels, self.num_labels, _REMEDY)
            loss = self.loss_function(logits, labels, self.config)
        return self._answer(return_dict, encoded, TokenClassifierOutput, loss=loss, logits=logits)


class ErnieMForQuestionAnswering(_ErnieMHead):
    """Finds the span of an answer: two scores a token, of being its start and its end."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if config.num_labels != 2:
            raise ValueError(f"num_labels={config.num_labels}; question answering scores starts and ends: set it to 2.")
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type = "ForQuestionAnswering"  # also of subclasses, whose names say nothing
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
            start_positions, end_positions: integer `(rows,)`, columns; one beyond the row, and in the packed layout
                one at padding, is left out of the loss.

        Returns:
            `loss` if both positions are given, `start_logits` and `end_logits` `(rows, columns)`, in the packed layout
            the lowest finite value at padding; `hidden_states`, `attentions`.
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
                _without_padding(_as_integers(name, positions), real)
                for name, positions in (("start_positions", start_positions), ("end_positions", end_positions))
            ]
            loss = self.loss_function(start_logits, end_logits, *columns)
        logits = {"start_logits": start_logits.contiguous(), "end_logits": end_logits.contiguous()}
        return self._answer(return_dict, encoded, QuestionAnsweringModelOutput, loss=loss, **logits)


class ErnieMForInformationExtraction(_ErnieMHead):
    """Universal information extraction: for every token the logits of being the start and the end of a span."""

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
            start_positions, end_positions: `(rows, columns)` of 0 and 1, or integer `(rows,)`, one column a row; a
                row whose column lies outside is left out of the loss, as padding is in the packed layout.

        Returns:
            `loss` if both positions are given, `start_logits` and `end_logits` `(rows, columns)`, in the packed layout
            the lowest finite value at padding; `hidden_states`, `attentions`.
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


def _as_dict(config: ErnieMConfig, return_dict: bool | None) -> bool:
    return config.return_dict if return_dict is None else return_dict


def _check_labels(name: str, labels: Tensor, shape: torch.Size, columns_will_do: bool = False) -> None:
    rows, columns = shape
    if labels.shape != shape and not (columns_will_do and labels.shape in ((rows,), (rows, 1))):
        other = f", or ({rows},) with one column a row" if columns_will_do else ""
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; it must be ({rows}, {columns}) like the input{other}."
        )


def _as_integers(name: str, labels: Tensor) -> Tensor:
    """int64, since losses take classes and columns as nothing else; and the ignored label needs a sign."""
    if labels.is_floating_point():
        raise ValueError(f"{name} has dtype {labels.dtype}; it must hold integers: convert it by .long().")
    return labels.long()


_REMEDY = "load the model with the num_labels that the data has, or check what numbers its labels"


def _check_classes(labels: Tensor, classes: int, remedy: str) -> None:
    """Each label must be a class or the ignored one; unchecked where that would wait for a device or break a graph."""
    if modes.is_recorded() or labels.device.type != "cpu" or not modes.has_values(labels):
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED_LABEL)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels{place or ''} is {labels[tuple(place)].item()}, outside [0, {classes}); {remedy}. "
            f"{IGNORED_LABEL} leaves a place out of the loss."
        )


def _flatten_choices(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, 1)


def _lowest_at_padding(logits: Tensor, real: Tensor | None) -> Tensor:
    """`(rows, columns, scores)` with the lowest finite value where `real`, bool `(rows, columns)`, says padding."""
    return logits if real is None else logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)


def _without_padding(positions: Tensor, real: Tensor | None) -> Tensor:
    """Positions at padding moved behind the row, where the loss ignores them."""
    if real is None:
        return positions
    columns = real.shape[1]
    positions = positions.squeeze(-1) if positions.dim() > 1 else positions
    real = real.expand(positions.shape[0], columns)
    at_padding = ~real.gather(1, positions.clamp(0, columns - 1)[:, None]).squeeze(1)
    return positions.masked_fill(at_padding, columns)


def _span_loss(logits: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
    """Mean binary cross entropy over `(rows, columns)`, without padding and without rows that have no valid column."""
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
