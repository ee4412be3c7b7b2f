"""What BERT and its descendants in transformers share: a model, its encoder and its layers on a TokenBatch.

Each class stands before transformers' own in a family's classes. What it cannot compute goes to that one.
"""

import functools
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output
from transformers.modeling_outputs import SequenceClassifierOutput

from .. import flags, ops
from ..batch import TokenBatch
from ..dropout import drop_features
from ..inference import InferenceEmbedding, InferenceModel, is_plain_inference
from ..inputs import check_tensors
from ..modes import is_plain
from ..ops import Product
from ..post_ln import (
    Places,
    PostLNLayer,
    PostLNStack,
    add_norm,
    embed_words,
    embeddings_dropout,
    is_plain_table,
    norm_of,
)
from . import fallback
from .layout import Tokens, lay_out, position_rows
from .saving import refuse_saving

# Given by a head that reads the first column of the hidden states, and nothing else.
FIRST_ONLY = "first_tokens_only"


class PackedLayer(PostLNLayer):
    """A layer that computes `(tokens, hidden)` if it is given a TokenBatch, and rows as in transformers if not."""

    places = Places(
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        out="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        norm1="attention.output.LayerNorm",
        norm2="output.LayerNorm",
        activation="intermediate.intermediate_act_fn",
        attention_dropout="attention.self.dropout",
        dropout1="attention.output.dropout",
        dropout2="output.dropout",
        heads="attention.self.num_attention_heads",
        scale="attention.self.scaling",
    )

    def forward(
        self, hidden_states: Tensor, attention_mask: TokenBatch | Tensor | None = None, *arguments: object, **options
    ) -> Tensor | tuple[Tensor, None]:
        """As `PostLNLayer.compute` with a TokenBatch, which comes in the place of the mask; else as in transformers."""
        if isinstance(attention_mask, TokenBatch):
            return self.compute(hidden_states, attention_mask, *arguments, **options)
        return super().forward(hidden_states, attention_mask, *arguments, **options)


class PackedEncoder(PostLNStack):
    """An encoder whose `forward` is transformers'; the model calls `compute` instead."""

    layers_name = "layer"


class PackedClassifier(nn.Module):
    """A head on the first column of the hidden states. Of input that came packed, it reads a row for each sequence."""

    def __init_subclass__(cls, **options: object) -> None:
        """Gives the class a `forward` with transformers' signature, from which Trainer knows inputs and labels."""
        super().__init_subclass__(**options)

        @functools.wraps(super(PackedClassifier, cls).forward)
        def forward(self: nn.Module, *arguments: object, **options: object) -> SequenceClassifierOutput | tuple:
            return super().forward(*arguments, **options, **{FIRST_ONLY: True})

        cls.forward = forward


class PackedModel(InferenceModel):
    """A bare model that computes no padding.

    Attributes:
        encoder_kind: the class of its encoder.
        first_position: the row of the position table where sequences start.
    """

    encoder_kind: ClassVar[type[PackedEncoder]]
    first_position: int
    _graphs: object = None  # see `use_graphs`

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Output | tuple:
        """Arguments and results are transformers'. Hidden states are zeros at padding, except in the first column.

        What the packed layout does not serve runs by transformers' own forward, and the log says so once.

        Sequences may come packed in one row, as `DataCollatorWithFlattening` makes it: with `cu_seq_lens_q` and
        `max_length_q`, or with `position_ids` alone that start anew where a sequence does. They do not attend to each
        other, and `pooler_output` has a row for each.

        Raises:
            ValueError: an argument is no tensor, or has a shape, a dtype or values that the model cannot take; a
                sequence is longer than there are positions; or packed input contradicts itself. The message names the
                argument, its value and the remedy.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }
        first_only = arguments.pop(FIRST_ONLY, False)
        named = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
        if isinstance(attention_mask, list):  # stock forwards take masks that are no tensors
            check_tensors(attention_mask=attention_mask)
        check_tensors(**{name: arguments[name] for name in named}, cu_seq_lens_q=arguments.get("cu_seq_lens_q"))
        reason = fallback.reason(self, arguments)
        if reason is not None:
            fallback.tell(self, reason)
            return super().forward(**arguments, use_cache=use_cache)
        return_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        with flags.held():
            tokens = lay_out(
                self,
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                token_type_ids,
                kwargs.get("cu_seq_lens_q"),
                kwargs.get("max_length_q"),
            )
            output = None
            if self._graphs is not None and not return_states:
                output = self._graphs.encode(self, tokens)
            if output is None:
                output = self._encode(tokens, return_states)
            if first_only and tokens.came_packed:
                output.last_hidden_state = tokens.batch.first_tokens(output.last_hidden_state[0])[:, None]
        return output.to_tuple() if kwargs.get("return_dict", self.config.return_dict) is False else output

    @property
    def longest_sequence(self) -> int:
        """The most tokens of a sequence."""
        return position_rows(self) - self.first_position

    def state_dict(self, *arguments: object, **options: object) -> dict[str, object]:
        """As in transformers; `save_pretrained` gets no rounded weights."""
        refuse_saving(self)
        return super().state_dict(*arguments, **options)

    def default_positions(self, input_ids: Tensor | None, grid: tuple[int, int], device: torch.device) -> Tensor:
        """int64 `(rows, columns)`, the rows of the position table for input that comes without positions."""
        raise NotImplementedError

    def graph_inputs(self, tokens: Tokens) -> dict[str, Tensor] | None:
        """What a graph reads of each token, int64 `(tokens,)`, by name; None if none can serve the call."""
        pools_first = self.pooler is None or type(self.pooler).__module__.startswith("transformers.")
        if tokens.input_ids is None or not pools_first:
            return None
        return {"input_ids": tokens.input_ids, "positions": tokens.positions, "types": tokens.types}

    def encode_packed(self, batch: TokenBatch, input_ids: Tensor, positions: Tensor, types: Tensor) -> Output:
        """Encodes tokens that are packed in one row, as a graph does it; arguments as of `graph_inputs`."""
        return self._encode(Tokens(batch, input_ids, None, positions, types, came_packed=True))

    def _drops(self) -> bool:
        """Whether a dropout is active."""
        return self.encoder.drops(self.embeddings.dropout)

    def _encode(self, tokens: Tokens, output_hidden_states: bool | list[int] = False) -> Output:
        batch = tokens.batch
        of_embeddings, of_layers = self.encoder.seeds(self.embeddings.dropout, batch.columns.device)
        hidden = _embed(self.embeddings, tokens, of_embeddings)
        return_states = bool(output_hidden_states)
        hidden, states, _ = self.encoder.compute(hidden, batch, of_layers, output_hidden_states=return_states)
        rows = batch.unpack(hidden)
        # Poolers and heads read the first column: of input that came packed, a row for each sequence.
        read = batch.first_tokens(hidden)[:, None] if tokens.came_packed else rows
        return Output(
            last_hidden_state=rows,
            pooler_output=None if self.pooler is None else self.pooler(read),
            hidden_states=_selected([*states[:-1], hidden], output_hidden_states, batch) if return_states else None,
        )


def _selected(states: list[Tensor], indices: bool | list[int], batch: TokenBatch) -> tuple[Tensor | None, ...]:
    """The states by rows: all of them, or those of a list of indices, with None for the others, as in transformers."""
    wanted = range(len(states)) if indices is True else {index % len(states) for index in indices}
    return tuple(batch.unpack(each) if index in wanted else None for index, each in enumerate(states))


def _embed(embeddings: nn.Module, tokens: Tokens, seeds: Tensor | None) -> Tensor:
    """`(tokens, hidden)`, the normalised sum of the rows of words, positions and token types, with dropout."""
    words, norm, batch, ids = embeddings.word_embeddings, embeddings.LayerNorm, tokens.batch, tokens.input_ids
    added = embeddings.position_embeddings(tokens.positions) + embeddings.token_type_embeddings(tokens.types)
    dropout = embeddings_dropout(embeddings.dropout, batch, seeds)
    padding = getattr(words, "padding_idx", None)
    if ids is not None and is_plain(norm, nn.LayerNorm) and _fits_op(words, padding, added):
        # The op adds a row to each word: here the sum of two others, a table with a row for each token.
        scale = getattr(words, "weight_scale", None)
        if isinstance(words, InferenceEmbedding):
            words.check_inference(ids)
        rows, options = torch.arange(batch.tokens, device=ids.device), {"word_scale": scale, "position_padding_idx": -1}
        parameters = words.weight, added, norm_of(norm), padding, dropout, getattr(words, "sparse", False)
        return ops.embeddings(ids, rows, *parameters, **options)
    if ids is None:
        embedded = tokens.inputs_embeds.to(added.dtype)
    elif is_plain(words, nn.Embedding) or is_plain_inference(words):
        embedded = words(ids)
    else:
        embedded = embed_words(words, ids, batch, padding or 0)
    return drop_features(add_norm(embedded, Product(added), norm), dropout)


def _fits_op(words: nn.Module, padding: int | None, added: Tensor) -> bool:
    """Whether `ops.embeddings` computes what a call of the word table would."""
    fits = padding is not None and is_plain_table(words, padding)
    return fits and (isinstance(words, InferenceEmbedding) or words.weight.dtype == added.dtype)
