"""Real texts, of bench/data/parallel.tsv."""

import csv

from tests import ROOT


def read_texts(count):
    """Translations of all languages and lengths."""
    with open(ROOT / "bench/data/parallel.tsv", encoding="utf-8", newline="") as file:
        texts = [row["translation"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return texts[:: len(texts) // count][:count]


TEXTS = read_texts(16)
