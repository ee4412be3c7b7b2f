"""`ErnieMInt8Config`: int8 weights in transformers' `from_pretrained` and `save_pretrained`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .inference import Int8Embedding, Int8Linear, freeze, places, round_rows

METHOD = "erniem_int8"


@register_quantization_config(METHOD)
class ErnieMInt8Config(QuantizationConfigMixin):
    """Loads an ERNIE-M model with the weights that `erniem_fast.optimize(model, weights="int8")` gives it.

    Pass it to `from_pretrained(checkpoint, quantization_config=ErnieMInt8Config())`. The float32 weights are read and
    rounded one after another. `save_pretrained` writes int8 weights and their scales, and such a checkpoint loads
    without a `quantization_config`.

    Args:
        modules_to_not_convert: layers, linears or the word table that stay in float32, by their names in `ErnieMModel`
            or the ends of these, as `encoder.layers.11`, `linear2` and `word_embeddings`.

    Raises:
        TypeError: an argument is unknown; or the names are a string.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, quant_method: str = METHOD) -> None:
        if isinstance(modules_to_not_convert, str):
            raise TypeError(f"modules_to_not_convert={modules_to_not_convert!r} is a string; pass a list of names.")
        self.quant_method = quant_method
        self.modules_to_not_convert = list(modules_to_not_convert or ())


def describe(config: PreTrainedConfig, bare: nn.Module) -> None:
    """Makes a config say which weights of its bare model are int8, so that the saved model loads again."""
    found = places(bare)
    kept = [name for name, module in found.items() if not isinstance(module, (Int8Linear, Int8Embedding))]
    present = getattr(config, "quantization_config", None)
    method = present.get("quant_method") if isinstance(present, dict) else getattr(present, "quant_method", None)
    if len(kept) < len(found):
        config.quantization_config = ErnieMInt8Config(kept)
    elif method == METHOD:
        del config.quantization_config


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    """How transformers loads a model with an `ErnieMInt8Config`."""

    is_trainable = False

    def validate_environment(self, device_map: object = None, **_: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        for device in map(str, devices):
            if device != "cpu":
                raise ValueError(
                    f"device_map names {device}, but int8 weights run on the CPU; leave device_map out, or load "
                    f"without ErnieMInt8Config."
                )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # of all that is not rounded

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and name == "weight" and isinstance(module, (Int8Linear, Int8Embedding))

    def get_quantize_ops(self) -> ConversionOps:
        return _Round()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        bare = model.base_model
        if bare.base_model_prefix != "ernie_m":
            raise TypeError(f"ErnieMInt8Config is for ERNIE-M models, not for {type(model).__name__}; leave it out.")
        found, kept = places(bare), self.quantization_config.modules_to_not_convert
        for each in kept:
            if all(should_convert_module(name, [each]) for name in found):
                raise ValueError(
                    f"modules_to_not_convert names {each!r}, which this model does not have; names are like "
                    f"{', '.join(list(found)[:2])}, or parts of these as linear2 and encoder.layers.0."
                )
        for name, module in found.items():
            if not should_convert_module(name, kept):
                continue
            with torch.device("meta"):
                if isinstance(module, nn.Linear):
                    rounded = Int8Linear(module.in_features, module.out_features, module.bias is not None)
                else:
                    rounded = Int8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
            bare.set_submodule(name, rounded)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        freeze(model.base_model)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()


class _Round(ConversionOps):
    """A float32 weight to an int8 one and its scales, while it is read."""

    def convert(self, input_dict: dict[str, list[Tensor]], full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        (tensors,) = input_dict.values()
        weight, scale = round_rows(tensors[0].float())
        return {full_layer_name: weight, f"{full_layer_name}_scale": scale}
