"""ErnieMConfig: the fields of an ERNIE-M checkpoint's config.json."""

import math
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .conversion import paddle, paddle_config

# ERNIE-M's position table starts with two reserved rows: column c uses row c + 2.
RESERVED_POSITIONS = 2


@strict
class ErnieMConfig(PreTrainedConfig):
    """The architecture of an ERNIE-M model; the defaults are those of ernie-m-base.

    Args:
        vocab_size: rows of the word table.
        hidden_size: features of a token, a multiple of `num_attention_heads`.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads of a layer.
        intermediate_size: features inside a layer's feed-forward half.
        hidden_act: a key of transformers' `ACT2FN`.
        hidden_dropout_prob: dropout of the embeddings and of both halves of a layer.
        attention_probs_dropout_prob: dropout of attention probabilities.
        max_position_embeddings: rows of the position table; two are reserved, so 514 serve 512 tokens.
        initializer_range: standard deviation of new weights.
        pad_token_id: the id of the padding token; this row gets no gradient in the word table and the position table.
        layer_norm_eps: added to the variance in layer norms.
        classifier_dropout: dropout before a head's classifier, `hidden_dropout_prob` if None. Also called `dropout`.
        act_dropout: dropout after the activation, `hidden_dropout_prob` if None.
        pruned_heads: the heads that were removed, by layer; written by `prune_heads`.
        uie_padded_length: the number of tokens that every row counts as padded to, 512 in UIE-M, whose weights were
            trained so: padding is attended to, and [CLS] (id 0) is not. None in ERNIE-M, where padding is not.
        tie_word_embeddings: whether the head that predicts words shares the word table with the encoder.

    Raises:
        ValueError: no model can be built from a field's value, or the file belongs to another architecture.
    """

    model_type = "ernie_m"
    attribute_map = {"dropout": "classifier_dropout", "num_classes": "num_labels"}  # noqa: RUF012 (as the base has it)

    vocab_size: int = 250002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 514
    initializer_range: float | int = 0.02
    pad_token_id: int = 1
    layer_norm_eps: float | int = 1e-05
    classifier_dropout: float | int | None = None
    act_dropout: float | int | None = 0.0
    pruned_heads: dict[int, list[int]] | dict[str, list[int]] | None = None
    uie_padded_length: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # JSON turns the keys into strings.
        self.pruned_heads = {
            int(layer) if str(layer).isdecimal() else layer: heads for layer, heads in (self.pruned_heads or {}).items()
        }
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; PaddleNLP's model_config.json and Baidu's ernie_config.json are found too."""
        error = None
        try:
            found = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as missing:
            found, error = ({}, kwargs), missing
        if found[0]:
            return found
        path = paddle.find_config(pretrained_model_name_or_path, kwargs)
        if path is not None:
            fields, rest = super().get_config_dict(path, **{**kwargs, "subfolder": ""})
            return paddle_config.from_paddle(fields), rest
        if error is not None:
            raise error
        return found

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ErnieMConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This checkpoint's config says model_type={model_type!r}, but erniem_fast runs {cls.model_type!r} "
                f"only; load it with transformers.AutoModel instead."
            )
        if paddle_config.is_paddles(config_dict):
            config_dict = paddle_config.from_paddle(config_dict)
        if kwargs.get("return_unused_kwargs") and "languages" in kwargs:
            # A model is loaded. Left here, its `languages` would replace the config's before it could compare them.
            languages = kwargs.pop("languages")
            config, unused = super().from_dict(config_dict, **kwargs)
            return config, {**unused, "languages": languages}
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        """Refuses fields that no model can be built from.

        It runs when a config is made and again when a model is, because fields can change in between: `from_pretrained`
        sets its keyword arguments one by one.

        Raises:
            ValueError: the message names the field, its value and the remedy.
        """
        self.classifier_dropout = self.classifier_dropout  # its type was not checked if it was set as `dropout`
        self._check_sizes()
        self._check_architecture()
        self._check_pruned_heads()
        self._check_numbers()

    def _check_sizes(self) -> None:
        for field in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} is not a size; use 1 or more.")
        if self.num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is not a number of layers; use 0 or more.")
        if self.uie_padded_length is not None and self.uie_padded_length < 1:
            raise ValueError(
                f"uie_padded_length={self.uie_padded_length} is not a length; use UIE-M's 512, or None for ERNIE-M."
            )

    def _check_pruned_heads(self) -> None:
        for layer, heads in self.pruned_heads.items():
            exist = layer in range(self.num_hidden_layers) and set(heads) <= set(range(self.num_attention_heads))
            if not exist or len(set(heads)) == self.num_attention_heads:
                raise ValueError(
                    f"pruned_heads takes heads {heads} out of layer {layer}, but there are {self.num_hidden_layers} "
                    f"layers of {self.num_attention_heads} heads, and each layer must keep one; correct the entry."
                )

    def _check_architecture(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; choose a number of heads that divides it."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; use one of {', '.join(sorted(ACT2FN))}.")
        if self.max_position_embeddings <= RESERVED_POSITIONS:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} leaves no position for a token; two are "
                f"reserved, so use at least {RESERVED_POSITIONS + 1}."
            )
        for table in ("vocab_size", "max_position_embeddings"):
            if not 0 <= self.pad_token_id < getattr(self, table):
                raise ValueError(
                    f"pad_token_id={self.pad_token_id} is not in [0, {table}={getattr(self, table)}); it must be a row "
                    f"of the word table and of the position table. Use the id of the tokenizer's padding token, 1 in "
                    f"ERNIE-M, or a larger {table}."
                )
        for field, only in (("position_embedding_type", "absolute"), ("is_decoder", False)):
            if getattr(self, field, only) not in (only, None):
                raise ValueError(f"{field}={getattr(self, field)!r} is not ERNIE-M; only {only!r} is supported.")

    def _check_numbers(self) -> None:
        for field in ("initializer_range", "layer_norm_eps"):
            if not 0.0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)} is out of range; use a finite number from 0 upwards.")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "act_dropout"):
            value = getattr(self, field)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{field}={value} is not a probability; use a number in [0, 1].")
