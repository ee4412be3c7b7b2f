"""Tiny checkpoints of three families, with tokenizers that cut texts into characters, and texts for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

import erniem_fast
from tests.golden import cases
from tests.integration.texts import TEXTS

LONG = "Ihr Kennwort wurde geändert. " * 60
ALL = [*TEXTS, "", "a", LONG, *TEXTS[:3]]
PAIRS = [*zip(TEXTS[:8], TEXTS[8:], strict=True), ("a", ""), ("Kennwort", LONG)]
FAMILIES = ("ernie_m", "xlm-roberta", "bert")
LIMIT = {"ernie_m": 512, "xlm-roberta": 60, "bert": 62}

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 62,
}
_CHARACTERS = sorted({character for text in ALL for character in text} - {" "})
_MODELS = {
    "ernie_m": (erniem_fast.ErnieMModel, erniem_fast.ErnieMForSequenceClassification),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaForSequenceClassification),
    "bert": (BertModel, BertForSequenceClassification),
}


def save(family, folder, labels=None):
    """Writes a checkpoint with a tokenizer into a folder, of a bare model or of a classifier; returns the folder."""
    torch.manual_seed(3)
    kind, head = _MODELS[family]
    options = {} if labels is None else {"num_labels": labels}
    if family == "ernie_m":
        model = (kind if labels is None else head).from_pretrained(cases.TINY, **options)
        tokenizer = erniem_fast.ErnieMTokenizer.from_pretrained(cases.TINY)
    else:
        tokenizer = _tokenizer(family)
        config_class = XLMRobertaConfig if family == "xlm-roberta" else BertConfig
        types = 1 if family == "xlm-roberta" else 2
        config = config_class(
            **_SIZES, **options, vocab_size=len(tokenizer), type_vocab_size=types, pad_token_id=tokenizer.pad_token_id
        )
        model = (kind if labels is None else head)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family != "ernie_m" or name.startswith("classifier"):
                parameter.normal_(mean=float(name.endswith("Norm.weight")), std=0.3)
    tokenizer.model_max_length = LIMIT[family]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _tokenizer(family):
    if family == "bert":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_CHARACTERS, *(f"##{each}" for each in _CHARACTERS)]
        vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        return BertTokenizer(vocab=vocabulary, do_lower_case=False, strip_accents=False)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(each for each in _CHARACTERS if each != "▁")]
    return XLMRobertaTokenizer(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)])
