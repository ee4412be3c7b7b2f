"""What BERT and its descendants in transformers share: a model, its encoder and its layers on a TokenBatch.

Each class stands before transformers' own in a family's classes. What it cannot compute goes to that one.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from .. import flags
from ..batch import TokenBatch, key_bias_of
from ..dropout import drop_features
from ..inference import InferenceModel, is_plain_inference
from ..inputs import is_full, leaves_out_padding
from ..modes import is_plain
from ..ops import Product
from ..post_ln import Places, PostLNLayer, PostLNStack, add_norm, embed_words, embeddings_dropout
from . import fallback


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


class PackedModel(InferenceModel):
    """A bare model that computes no padding.

    Attributes:
        encoder_kind: the class of its encoder.
    """

    encoder_kind: ClassVar[type[PackedEncoder]]

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
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """Arguments and results are transformers'. Hidden states are zeros at padding, except in the first column.

        What the packed layout does not serve runs by transformers' own forward, and the log says so once.
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
        reason = fallback.reason(self, arguments)
        if reason is not None:
            fallback.tell(self, reason)
            return super().forward(**arguments, use_cache=use_cache)
        return_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        with flags.held():
            output = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_states)
        return output.to_tuple() if kwargs.get("return_dict", self.config.return_dict) is False else output

    def default_positions(self, input_ids: Tensor | None, grid: tuple[int, int], device: torch.device) -> Tensor:
        """int64 `(rows, columns)`, the rows of the position table for input that comes without positions."""
        raise NotImplementedError

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        given = inputs_embeds if input_ids is None else input_ids
        grid, device = tuple(given.shape[:2]), given.device
        if position_ids is None:
            position_ids = self.default_positions(input_ids, grid, device)
        batch = _lay_out(attention_mask, grid, device)
        of_embeddings, of_layers = self.encoder.seeds(self.embeddings.dropout, device)
        positions = batch.pack(position_ids.expand(grid))
        types = torch.zeros_like(positions) if token_type_ids is None else batch.pack(token_type_ids.expand(grid))
        ids, embedded = (None if each is None else batch.pack(each) for each in (input_ids, inputs_embeds))
        hidden = _embed(self.embeddings, batch, ids, embedded, positions, types, of_embeddings)
        hidden, states, _ = self.encoder.compute(hidden, batch, of_layers, output_hidden_states=output_hidden_states)
        rows = batch.unpack(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=rows,
            pooler_output=None if self.pooler is None else self.pooler(rows),
            hidden_states=(*map(batch.unpack, states[:-1]), rows) if output_hidden_states else None,
        )


def _lay_out(attention_mask: Tensor | None, grid: tuple[int, int], device: torch.device) -> TokenBatch:
    """The tokens of a forward: those that are attended to, and the first of each row, which poolers and heads read.

    Without a mask all are attended to, padding included.
    """
    mask = None if attention_mask is None else attention_mask.to(device) != 0
    if mask is None or is_full(mask):
        return TokenBatch.padded(grid, device)
    if not leaves_out_padding():
        return TokenBatch.padded(grid, device, key_bias_of(mask))
    # What is computed in the first column is shown, even if it is padding.
    return replace(TokenBatch.from_mask(mask, keep_first=True), real=None)


def _embed(
    embeddings: nn.Module,
    batch: TokenBatch,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    positions: Tensor,
    token_types: Tensor,
    seeds: Tensor | None,
) -> Tensor:
    """`(tokens, hidden)`, from `(tokens,)` ids, positions and token types, or embeddings in the place of the ids."""
    words = embeddings.word_embeddings
    added = embeddings.position_embeddings(positions) + embeddings.token_type_embeddings(token_types)
    if inputs_embeds is not None:
        embedded = inputs_embeds.to(added.dtype)
    elif is_plain(words, nn.Embedding) or is_plain_inference(words):
        embedded = words(input_ids)
    else:
        embedded = embed_words(words, input_ids, batch, getattr(words, "padding_idx", None) or 0)
    normed = add_norm(embedded, Product(added), embeddings.LayerNorm)
    return drop_features(normed, embeddings_dropout(embeddings.dropout, batch, seeds))
