"""Real text: sentences in many languages, as token ids."""

import csv
from collections.abc import Callable
from typing import NamedTuple

from bench import ROOT
from erniem_fast import ErnieMTokenizer

PARALLEL = ROOT / "bench/data/parallel.tsv"
TOKENIZER = ROOT / "tests/golden/tiny"  # for random weights, which have none
# The file is full of menu labels ("Log out"), which leave a batch of 32 only 28 % full and would flatter peers that
# skip padding. Translations of ten English words or more are sentences, and fill it to 45 % on average over seeds
# (standard deviation over two batches: 4.5 %). The first two batches of jobs.SEED are as full as that average.
SENTENCE_WORDS = 10


class Translation(NamedTuple):
    """A row of parallel.tsv."""

    language: str
    english: str
    translation: str


def read_translations() -> list[Translation]:
    """All of parallel.tsv."""
    with PARALLEL.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [Translation(*row) for row in rows]


def read_sentences() -> list[str]:
    """The translations in parallel.tsv whose English has SENTENCE_WORDS words or more."""
    return [row.translation for row in read_translations() if len(row.english.split()) >= SENTENCE_WORDS]


def text_encoder(folder, max_length: int) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to lists of token ids, `max_length` at most, with the tokenizer in `folder`."""
    tokenizer = ErnieMTokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
