"""Tokenizers of converted checkpoints: each keeps the ids that its model was trained with."""

import json
import shutil
import tempfile
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from ..tokenization import BAIDUS_SENTENCEPIECE, VOCAB_FILES_NAMES, ErnieMTokenizer

_VOCABULARY, _PIECES = VOCAB_FILES_NAMES["vocab_file"], VOCAB_FILES_NAMES["sentencepiece_model_ckpt"]


def from_xlm_roberta(source: Path) -> ErnieMTokenizer | None:
    """XLM-RoBERTa's tokens and ids; None if a folder does not have its SentencePiece model."""
    pieces = source / _PIECES
    if not pieces.is_file():
        return None
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=_VOCABULARY) as file:
        file.writelines(f"{token}\n" for token in xlm_roberta_vocabulary(pieces))
        file.flush()
        return ErnieMTokenizer(str(pieces), file.name, pretokenization="sentencepiece")


def xlm_roberta_vocabulary(pieces: Path) -> list[str]:
    """ERNIE-M's tokens in the order of XLM-RoBERTa's ids, for a SentencePiece model of XLM-RoBERTa.

    Special tokens have the same ids in both, and masks come last. XLM-RoBERTa counts pieces from the model's fourth on,
    which has the id 4.
    """
    model = SentencePieceProcessor(model_file=str(pieces))
    return ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *map(model.id_to_piece, range(3, model.get_piece_size())), "[MASK]"]


def from_ernie_m(source: Path) -> ErnieMTokenizer | None:
    """The tokenizer in a folder of ours, PaddleNLP's or Baidu's; None if files are missing."""
    if not (source / _VOCABULARY).is_file() or not any(
        (source / name).is_file() for name in (_PIECES, BAIDUS_SENTENCEPIECE)
    ):
        return None
    return ErnieMTokenizer.from_pretrained(source)


def write(tokenizer: ErnieMTokenizer, out: Path) -> list[str]:
    """Writes a tokenizer for this library; there is nothing to say about it."""
    tokenizer.save_pretrained(out)
    return []


def write_for_paddle(tokenizer: ErnieMTokenizer, out: Path) -> list[str]:
    """Writes a tokenizer for PaddleNLP, and returns what differs there, in lines."""
    tokenizer.save_vocabulary(str(out))
    _write_config(out, tokenizer_class="ErnieMTokenizer", do_lower_case=tokenizer.do_lower_case)
    if tokenizer.pretokenization == "paddlenlp":
        return []
    return [f"PaddleNLP cuts some texts otherwise than pretokenization={tokenizer.pretokenization!r} does here."]


def write_for_xlm_roberta(tokenizer: ErnieMTokenizer, out: Path) -> list[str]:
    """Writes XLM-RoBERTa's tokenizer if it gives the same ids, and ours if not; returns what to know, in lines."""
    if not has_ids_of_xlm_roberta(tokenizer):
        tokenizer.save_pretrained(out)
        return [
            "The tokenizer is ErnieMTokenizer, as XLM-RoBERTa's would give other ids: import erniem_fast to load it."
        ]
    shutil.copy(tokenizer.sentencepiece_model_ckpt, out / _PIECES)
    _write_config(out, tokenizer_class="XLMRobertaTokenizer", model_max_length=tokenizer.model_max_length)
    return []


def has_ids_of_xlm_roberta(tokenizer: ErnieMTokenizer) -> bool:
    """Whether XLM-RoBERTa's own tokenizer gives the same ids."""
    model = tokenizer.sp_model
    pieces = range(3, model.get_piece_size())
    return tokenizer.pretokenization == "sentencepiece" and all(
        tokenizer.vocab.get(model.id_to_piece(id_)) == id_ + 1 for id_ in pieces
    )


def _write_config(out: Path, **fields: object) -> None:
    (out / "tokenizer_config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
