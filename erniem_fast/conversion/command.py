"""`python -m erniem_fast convert`: a checkpoint's folder as another library or model reads it."""

import argparse
import json
import pickle
import sys
from pathlib import Path

import transformers

from .. import modeling
from ..configuration import ErnieMConfig
from . import published, tokenizers
from .paddle import save_as_paddle
from .xlm_roberta import from_xlm_roberta, to_xlm_roberta

# The model of pre-training, without the language embeddings that only its objectives use.
_PUBLISHED = {"ErnieMForPreTraining": "ErnieMForMaskedLM"}
TARGETS = ("ernie_m", "paddle", "xlm_roberta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of PaddleNLP, Baidu, XLM-RoBERTa or ERNIE-M")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--to", choices=TARGETS, default=TARGETS[0], help="what OUT is for (default: %(default)s)")
    parser.add_argument("--encoder", action="store_true", help="convert the encoder alone, without a head")
    parser.add_argument(
        "--check", action="store_true", help="compare with the result that was published for ernie-m-base"
    )


def run(arguments: argparse.Namespace) -> int:
    """Converts; returns the exit status."""
    options = {name: getattr(arguments, name) for name in ("source", "out", "to", "encoder", "check")}
    try:
        print("\n".join(convert(**options)))
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def convert(source: Path, out: Path, to: str = TARGETS[0], encoder: bool = False, check: bool = False) -> list[str]:
    """Writes a checkpoint, with its tokenizer, in another form.

    Args:
        source: a folder of PaddleNLP or Baidu, or one of transformers with an XLM-RoBERTa or ERNIE-M model.
        out: the folder to write.
        to: "ernie_m" for this library and transformers, "paddle" for PaddleNLP, "xlm_roberta" for transformers.
        encoder: whether to leave a head out.
        check: whether to compare the model with the result that was published for ernie-m-base.

    Returns:
        What was written, and what to know about it, in lines.

    Raises:
        ValueError: the target has nothing like a part of the model; or `source` holds no model that is known here, or,
            with `check`, another one than ernie-m-base.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} is not empty; name a new folder.")
    if not source.is_dir():
        raise ValueError(f"{str(source)!r} is not a folder; name the one with the checkpoint's files.")
    is_xlm_roberta = _model_type(source) == "xlm-roberta"
    model = from_xlm_roberta(_load_xlm_roberta(source, encoder)) if is_xlm_roberta else _load_ernie_m(source, encoder)
    if check:
        published.check(model.base_model)
    if to == "paddle":
        save_as_paddle(model, out)
    else:
        (to_xlm_roberta(model) if to == "xlm_roberta" else model).save_pretrained(out)
    written = f"{type(model).__name__} with {model.num_parameters():,} parameters: {out}"
    tokenizer = (tokenizers.from_xlm_roberta if is_xlm_roberta else tokenizers.from_ernie_m)(source)
    if tokenizer is None:
        return [written, f"No tokenizer, because {source} lacks its files. The ids are what they were: copy them."]
    write = {"ernie_m": tokenizers.write, "paddle": tokenizers.write_for_paddle}
    return [written, *write.get(to, tokenizers.write_for_xlm_roberta)(tokenizer, out)]


def _model_type(source: Path) -> str | None:
    path = source / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a model's config ({error}); copy it again.") from None


def _load_xlm_roberta(source: Path, encoder: bool) -> transformers.PreTrainedModel:
    config = transformers.XLMRobertaConfig.from_pretrained(source)
    name = "XLMRobertaModel" if encoder or not config.architectures else config.architectures[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"config.json names {name!r}, which transformers does not have; use --encoder.")
    return _load_whole(model_class, source)


def _load_ernie_m(source: Path, encoder: bool) -> modeling.ErnieMPreTrainedModel:
    config = ErnieMConfig.from_pretrained(source)
    name = "ErnieMModel" if encoder or not config.architectures else config.architectures[0]
    model_class = getattr(modeling, _PUBLISHED.get(name, name), None)
    if model_class is None:
        raise ValueError(f"The config names {name!r}, which erniem_fast does not have; use --encoder.")
    return _load_whole(model_class, source, dtype="auto")


def _load_whole(
    model_class: type[transformers.PreTrainedModel], source: Path, **options
) -> transformers.PreTrainedModel:
    """A model with all its weights from a checkpoint. A pooler may be missing, as in checkpoints that never ran one."""
    model, info = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise ValueError(
            f"{str(source)!r} holds {name!r} of shape {tuple(found)}, and its config asks for {tuple(expected)}; take "
            f"both from the same checkpoint."
        )
    missing = sorted(name for name in info["missing_keys"] if "pooler." not in name)
    if missing:
        raise ValueError(
            f"{str(source)!r} lacks {len(missing)} tensors of {model_class.__name__}, {missing[0]!r} among them, which "
            f"would be random; copy its files again, or, if only a head is missing, use --encoder."
        )
    return model
