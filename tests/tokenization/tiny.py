"""The tiny checkpoint's files, and what its tokenizers can have."""

from transformers import AddedToken

from erniem_fast import ErnieMTokenizer
from tests.golden.cases import TINY

MODEL_FILE, VOCAB_FILE = str(TINY / "sentencepiece.bpe.model"), str(TINY / "vocab.txt")


def with_flags(**kwargs):
    """A tokenizer whose added tokens have every property that an added token can have."""
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, additional_special_tokens=["<ent>"], **kwargs)
    tokenizer.add_tokens(
        [
            AddedToken("ErnieM", lstrip=True, rstrip=True),
            AddedToken("RR", rstrip=True),
            AddedToken("ab", single_word=True),
            AddedToken("QuX", normalized=False),
        ]
    )
    return tokenizer


# What transformers 4.57.6 computed: text, tokens, decoded ids, and tokens with do_lower_case=True.
ADDED_TOKENS = [
    ("a  ErnieM  b", "▁a ErnieM ▁b", "[CLS] a ErnieM b[SEP]", "▁a erniem ▁b"),
    ("a\x85ErnieM\x85b", "▁a ErnieM ▁b", "[CLS] a ErnieM b[SEP]", "▁a erniem ▁b"),
    ("a\x85RR\x85b", "▁a \x85 RR ▁b", "[CLS] a[UNK] RR b[SEP]", "▁a \x85 rr ▁b"),
    ("ERNIEM c", "▁E R N I E M ▁c", "[CLS] E[UNK][UNK][UNK][UNK][UNK] c[SEP]", "erniem ▁c"),
    ("cab ab abc ab", "▁c ab ab ▁ab c ab", "[CLS] c ab ab abc ab [SEP]", "▁c ab ab ▁ab c ab"),
    ("xab<ent>ab", "▁x ab < ent > ab", "[CLS] x ab [UNK]ent[UNK] ab [SEP]", "▁x ab < ent > ab"),
    ("QuX qux", "QuX ▁qu x", "[CLS] QuX qux[SEP]", "▁qu x ▁qu x"),
    ("<ENT> <ent>Hi", "< E N T > <ent> ▁H i", "[CLS][UNK][UNK][UNK][UNK][UNK] <ent> Hi[SEP]", "<ent> <ent> ▁h i"),
    ("İ [MASK]A", "▁İ [MASK] ▁A", "[CLS] İ[MASK] A[SEP]", "▁i ̇ [MASK] ▁a"),
]
