"""ERNIE-M's weights and pieces as XLM-RoBERTa, which users of sentence-transformers have: bare, and a reranker."""

import pathlib
from collections.abc import Callable

import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import XLMRobertaForSequenceClassification, XLMRobertaTokenizer

from bench.peers import xlm_roberta
from erniem_fast.configuration import RESERVED_POSITIONS

SEED = 0
HEAD = 0.1  # standard deviation of a reranker's head, so that its scores differ
UNLIKELY = -1e3  # of tokens that SentencePiece does not know


def save(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the checkpoint in `folder`, ERNIE-M's, as XLM-RoBERTa: a bare model in output/bare, output/reranker."""
    bare = xlm_roberta.load(folder, torch.float32, "sdpa")
    torch.manual_seed(SEED)
    bare.config.num_labels = 1
    reranker = XLMRobertaForSequenceClassification(bare.config)
    reranker.roberta.load_state_dict(bare.state_dict(), strict=False)  # it has no pooler
    for parameter in reranker.classifier.parameters():
        parameter.data.normal_(std=HEAD)
    tokenizer = fast_tokenizer(folder)
    tokenizer.model_max_length = bare.config.max_position_embeddings - RESERVED_POSITIONS
    for name, model in (("bare", bare), ("reranker", reranker)):
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)


def fast_tokenizer(folder: pathlib.Path) -> XLMRobertaTokenizer:
    """XLM-RoBERTa's, with the ids of vocab.txt and the pieces' scores in the SentencePiece model."""
    model = ModelProto.FromString((folder / "sentencepiece.bpe.model").read_bytes())
    scores = {piece.piece: piece.score for piece in model.pieces}
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    special = {"cls": "[CLS]", "bos": "[CLS]", "sep": "[SEP]", "eos": "[SEP]", "unk": "[UNK]", "pad": "[PAD]"}
    return XLMRobertaTokenizer(
        vocab=[(token, scores.get(token, UNLIKELY)) for token in tokens],
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap or None,
        mask_token="[MASK]",
        **{f"{name}_token": token for name, token in special.items()},
    )


def load_encoder(folder: pathlib.Path):
    """The `SentenceTransformer` of a bare model that `save` wrote: means at length 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    words = Transformer(str(folder))
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[words, pooling, Normalize()], device="cpu")


def load_reranker(folder: pathlib.Path):
    """The `CrossEncoder` of a reranker that `save` wrote; scores are logits."""
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())


LOADERS: dict[str, Callable] = {"bare": load_encoder, "reranker": load_reranker}
