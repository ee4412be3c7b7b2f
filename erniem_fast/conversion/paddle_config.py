"""Configs of ERNIE-M as PaddleNLP and Baidu write them, and ours."""

from typing import Any

# Heads whose classes have other names in PaddleNLP; UIE-M's was defined twice.
_CLASSES = {"UIEM": "ErnieMForInformationExtraction", "UIE": "ErnieMForInformationExtraction"}
_PADDLES = {"ErnieMForInformationExtraction": "UIEM"}
_NOT_PADDLES = ("ErnieMForMaskedLM", "ErnieMForPreTraining")
_MARKS = ("init_class", "init_args", "paddlenlp_version")
_ONLY_PADDLES = (*_MARKS, "type_vocab_size")  # the last is a field that no ERNIE-M reads


def is_paddles(fields: dict[str, Any]) -> bool:
    """Whether a config's fields were written by PaddleNLP."""
    return any(mark in fields for mark in _MARKS)


def from_paddle(fields: dict[str, Any]) -> dict[str, Any]:
    """Our fields for those of PaddleNLP's config.json or model_config.json, or of Baidu's ernie_config.json.

    Paddle's ERNIE-M has fixed what its configs do not say, or say wrong: 4 * hidden_size features in the feed-forward
    network, an eps of 1e-5, and 1 as the id of padding. (0, a default of PaddleNLP, is the id of [CLS].)

    Raises:
        ValueError: the config is of another model than ERNIE-M.
    """
    flat = _flattened(fields)
    classes = flat.get("architectures") or []
    for name in classes:
        if not name.startswith("ErnieM") and name not in _CLASSES:
            raise ValueError(
                f"This checkpoint was saved by Paddle's {name}, but erniem_fast runs ERNIE-M only; load it in Paddle."
            )
    ours = {name: value for name, value in flat.items() if name not in _ONLY_PADDLES}
    ours["architectures"] = [_CLASSES.get(name, name) for name in classes] or None
    ours["model_type"] = flat.get("model_type", "ernie_m")
    ours["intermediate_size"] = 4 * flat.get("hidden_size", 768)
    ours["layer_norm_eps"] = 1e-5
    ours["pad_token_id"] = flat.get("pad_token_id") or 1
    if any(name in _CLASSES for name in classes):
        ours["uie_padded_length"] = _padded_length(flat)
    return ours


def _padded_length(fields: dict[str, Any]) -> int:
    """UIE-M was trained on rows padded to this length, with attention to the padding."""
    return min(512, fields.get("max_position_embeddings", 514) - 2)


def _flattened(fields: dict[str, Any]) -> dict[str, Any]:
    """One level of fields. Until 2.4 a head's config held its encoder's, by position or by name."""
    flat = {name: value for name, value in fields.items() if name != "init_args"}
    arguments = list(fields.get("init_args") or ())
    nested = [value for value in (*arguments, *flat.values()) if isinstance(value, dict) and "init_class" in value]
    positional = [value for value in arguments if not isinstance(value, dict)]
    flat = {name: value for name, value in flat.items() if not any(value is each for each in nested)}
    flat.update(zip(("num_classes", "dropout"), positional, strict=False))
    if "init_class" in flat:
        flat["architectures"] = [flat["init_class"]]
    for inner in nested:
        flat = {**_flattened(inner), **flat}
    return flat


def to_paddle(fields: dict[str, Any]) -> dict[str, Any]:
    """PaddleNLP's config.json (from 2.5 on) for our fields.

    Raises:
        ValueError: Paddle's ERNIE-M does not have a field's value, or the model's head.
    """
    for name in fields.get("architectures") or ():
        if name in _NOT_PADDLES:
            raise ValueError(
                f"PaddleNLP has no {name}; save the encoder alone, which is model.ernie_m (convert: --encoder)."
            )
    fixed = {
        "intermediate_size": 4 * fields["hidden_size"],
        "layer_norm_eps": 1e-5,
        "act_dropout": 0.0,
        "pruned_heads": {},
    }
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"Paddle's ERNIE-M has {name}={value!r} always, and this model {fields[name]!r}; it cannot be saved in "
                f"Paddle's layout."
            )
    _check_attended_padding(fields)
    kept = {
        name: value
        for name, value in fields.items()
        if name not in ("dtype", "transformers_version", "uie_padded_length")
    }
    kept["architectures"] = [_PADDLES.get(name, name) for name in fields.get("architectures") or ()]
    return {**kept, "paddlenlp_version": None}


def _check_attended_padding(fields: dict[str, Any]) -> None:
    """Refuses a model that treats padding in another way than its class says: Paddle's configs do not say it."""
    padded, has = _padded_length(fields), fields.get("uie_padded_length")
    if any(name in _PADDLES for name in fields.get("architectures") or ()):
        if has != padded:
            raise ValueError(
                f"Paddle's UIEM attends to padding as if uie_padded_length={padded}, and this model has {has!r}, so "
                f"that it would find something else there; train a model that was loaded with "
                f"uie_padded_length={padded}, or save the encoder alone (convert: --encoder)."
            )
    elif has is not None:
        raise ValueError(
            f"In Paddle's layout UIEM alone attends to padding, and without its head this model's uie_padded_length="
            f"{has} would be lost, so that it would compute something else; save it with the head (convert: without "
            f"--encoder), or load it with uie_padded_length=None if that is wanted."
        )
