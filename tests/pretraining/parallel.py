"""Real translations, and the tiny model for them."""

from bench.model.text import PARALLEL, read_translations
from erniem_fast.pretraining import BTMLM, CAMLM, MMLM, TLM, ErnieMForPreTraining, Pair, Sentence, Task, TsvFiles
from tests.golden import cases

LANGUAGES = ["en", *dict.fromkeys(row.language for row in read_translations())]
COLUMNS = {"source": "english", "target": "translation", "source_language": "en", "target_language": "lang"}
PAIRS = [Pair(row.english, row.translation, "en", row.language) for row in read_translations()[5::97]]
SENTENCES = [Sentence(pair.target, pair.target_language) for pair in PAIRS]


def read_pairs():
    return TsvFiles(PARALLEL, **COLUMNS)


def objectives(tokenizer, max_length=64, **languages):
    """All four."""
    options = {"tokenizer": tokenizer, "max_length": max_length}
    return [MMLM(**options), TLM(**options), CAMLM(**options, **languages), BTMLM(**options, **languages)]


def tasks(tokenizer, **languages):
    sources = SENTENCES, PAIRS, PAIRS, SENTENCES
    return [Task(*each) for each in zip(objectives(tokenizer, **languages), sources, strict=True)]


def load(languages=None, **config):
    model = ErnieMForPreTraining.from_pretrained(cases.TINY, languages=languages, **cases.NO_DROPOUT, **config)
    return model.eval()
