"""What word_ids(), char_to_token() and their like answer: as the fast tokenizer of XLM-RoBERTa, where tokens agree."""

import copy
import json
import pickle
import random
import shutil
import unicodedata

import pytest
import tokenizers
from tokenizers import normalizers
from transformers import AutoTokenizer, BatchEncoding

from erniem_fast import ErnieMTokenizer
from erniem_fast.conversion import tokenizers as conversion
from erniem_fast.pretokenization import WAYS
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE, with_flags

PUNCTUATION = [",", ".", "!", "(", "《", "》", "12", "3,5", "-", "@"]
SPACES = [" ", "  ", "\u3000", "\n", " \t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xlm_roberta")
    shutil.copy(MODEL_FILE, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["right", "left"])
def both(request, folder):
    """A tokenizer of ours and a fast one, with the same ids; they truncate and pad on one side."""
    fast, ours = AutoTokenizer.from_pretrained(folder), conversion.from_xlm_roberta(folder)
    for tokenizer in (fast, ours):
        tokenizer.truncation_side = tokenizer.padding_side = request.param
    assert fast.backend_tokenizer is not None
    return ours, fast


@pytest.fixture(scope="module")
def words(texts, both):
    """Words of Django's translations that both cut in the same way, and normalisation leaves alone."""
    found = {word for text in texts[::7] for word in text.split() if unicodedata.normalize("NFKC", word) == word}
    return agree(*both, sorted(word for word in found if not {"\u200c", "\u200e"} & set(word)))


def random_words(words, generator):
    for _ in range(generator.randrange(8)):
        word = generator.choice(words)
        yield generator.choice([word, word + generator.choice(PUNCTUATION), generator.choice(PUNCTUATION) + word])


def random_text(words, generator):
    return "".join(word + generator.choice(SPACES) for word in random_words(words, generator))


def agree(ours, fast, items):
    """The items that both tokenizers cut in the same way, of texts or of lists of words."""
    split = {"is_split_into_words": not isinstance(items[0], str)}
    return [item for item in items if ours(item, **split)["input_ids"] == fast(item, **split)["input_ids"]]


def answers(encoding: BatchEncoding, index: int, longest: int) -> dict:
    """Everything that a row says of its tokens, words and characters, the last of them up to `longest`."""
    row = encoding.encodings[index]
    places, sequences = range(len(row.ids)), range(encoding.n_sequences)
    found = {name: getattr(row, name) for name in ("ids", "offsets", "special_tokens_mask", "attention_mask")}
    found |= {name: getattr(encoding, name)(index) for name in ("word_ids", "sequence_ids")}
    for name in ("token_to_chars", "token_to_word", "token_to_sequence"):
        found[name] = [getattr(encoding, name)(index, place) for place in places]
    for name in ("char_to_token", "char_to_word"):
        found[name] = [getattr(encoding, name)(index, place, each) for each in sequences for place in range(longest)]
    numbers = {(word, each) for word, each in zip(row.word_ids, row.sequence_ids, strict=True) if word is not None}
    for name in ("word_to_tokens", "word_to_chars"):
        found[name] = [getattr(encoding, name)(index, *each) for each in sorted(numbers)]
    return found


def assert_same(ours, fast, *batch, **options):
    mine, theirs = ours(*batch, **options), fast(*batch, **options)
    assert mine.is_fast
    assert len(mine.encodings) == len(theirs.encodings) > 0
    assert mine.n_sequences == theirs.n_sequences
    special = set(ours.all_special_ids)
    for index, row in enumerate(theirs.encodings):
        assert answers(mine, index, 60) == answers(theirs, index, 60)
        inner = [place for place, id_ in enumerate(row.ids) if id_ not in special]
        assert [mine.tokens(index)[place] for place in inner] == [theirs.tokens(index)[place] for place in inner]


OPTIONS = [
    {},
    {"padding": True, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 40, "truncation": True},
    {"truncation": True, "max_length": 8, "padding": True, "pad_to_multiple_of": 4},
    {
        "truncation": True,
        "max_length": 9,
        "stride": 3,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
    },
    {"truncation": True, "max_length": 7, "add_special_tokens": False, "return_tensors": "np", "padding": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts(both, words, options):
    ours, fast = both
    generator = random.Random(1)
    same = agree(ours, fast, [random_text(words, generator) for _ in range(100)])
    assert len(same) > 50
    if options.get("add_special_tokens", True):
        assert_same(ours, fast, same, **options)
    else:
        # A fast tokenizer says of padding that it belongs to the text if there are no special tokens.
        assert_same(ours, fast, [text for text in same if len(ours.tokenize(text)) >= 7], **options)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_words(both, words, options):
    ours, fast = both
    generator = random.Random(2)
    same = agree(ours, fast, [[*random_words(words, generator), "", "a \u3000 b"] for _ in range(100)])
    assert len(same) > 50
    assert_same(ours, fast, same, is_split_into_words=True, **options)


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_pairs(both, words, strategy):
    ours, fast = both
    generator = random.Random(3)
    same = agree(ours, fast, [random_text(words, generator) for _ in range(250)])
    # A sequence that would lose all its tokens is an error to fast tokenizers, and stays whole here.
    same = [text for text in same if len(ours.tokenize(text)) > 9]
    firsts, seconds = same[::2], same[1::2]
    pairs = list(zip(firsts, seconds, strict=False))
    assert len(pairs) > 30
    for options in ({}, {"padding": True}):
        assert_same(ours, fast, pairs, **options)
    pairs = [pair for pair in pairs if sum(len(ours.tokenize(text)) for text in pair) - 8 > 9]
    for first, second in pairs[:20]:
        kept = {"only_first": second, "only_second": first}.get(strategy, "")
        options = {"truncation": strategy, "max_length": len(ours.tokenize(kept)) + 12, "padding": True}
        assert_same(ours, fast, [(first, second)], **options)
        if strategy != "longest_first":
            options |= {"return_overflowing_tokens": True, "stride": 2, "return_tensors": "pt"}
            assert_same(ours, fast, [(first, second)], **options)


def test_added_tokens_are_words(both):
    ours, fast = copy.deepcopy(both)
    for tokenizer in (ours, fast):
        tokenizer.add_tokens(["ErnieM"])
    assert_same(ours, fast, ["Save ErnieM and", "SaveErnieMErnieM", "ErnieM"])


# ---- ERNIE-M's own tokens


def test_words_of_ernie_ms_tokens():
    tokenizer = with_flags()
    encoding = tokenizer("日本語：ab 《x》 12c ErnieM d")  # noqa: RUF001
    assert encoding.tokens()[1:-1] == ["日", "本", "語", ":", "ab", "《", "x", "》", "1", "2", "c", "ErnieM", "▁d"]
    assert encoding.word_ids() == [None, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, None]
    assert (encoding.word_to_chars(1), encoding.word_to_tokens(1)) == ((7, 10), (6, 9))
    assert (encoding.char_to_word(6), encoding.char_to_token(6), encoding.char_to_token(7)) == (None, None, 6)
    assert encoding.token_to_chars(0) is None


def test_a_token_of_a_space_alone_belongs_to_the_word_after_it(tokenizer):
    encoding = tokenizer("x 《b》 ½")
    assert encoding.tokens()[1:-1] == ["▁x", "▁", "《", "b", "》", "1", "\u2044", "2"]
    assert encoding.word_ids()[1:-1] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert (encoding.token_to_chars(2), encoding.word_to_chars(1)) == ((2, 3), (2, 5))
    assert (encoding.char_to_token(1), encoding.char_to_token(2)) == (None, 2)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_tokenizing(way, golden):
    """Tokens, ids and offsets are those of the call; and words are what spaces separate."""
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, pretokenization=way)
    for text in golden["odd"]["texts"]:
        encoding = tokenizer(text, return_offsets_mapping=True)
        row = encoding[0]
        assert (row.ids, row.offsets) == (encoding["input_ids"], encoding["offset_mapping"])
        assert row.tokens == ["[CLS]", *tokenizer.tokenize(text), "[SEP]"]
        assert row.word_ids[1:-1] == sorted(row.word_ids[1:-1])
    text = "We sent 12,5 to 北京 in 2019年, not “Bonn”."
    encoding = tokenizer(text)
    spans = [encoding.word_to_chars(word) for word in range(len(text.split()))]
    assert [text[start:end] for start, end in spans] == text.split()
    assert encoding.word_ids()[-2] == len(spans) - 1


def test_an_encoding_is_made_when_it_is_asked_for(monkeypatch):
    made = []
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)

    def arrange(*arguments, **options):
        made.append(arguments)
        return ErnieMTokenizer.arrange(tokenizer, *arguments, **options)

    monkeypatch.setattr(tokenizer, "arrange", arrange)
    encoding = tokenizer(["Save", "a b", "c"])
    assert len(made) == 3
    assert encoding.word_ids(1) == encoding.word_ids(-2) == [None, 0, 1, None]
    assert len(made) == 4
    assert isinstance(encoding[2], tokenizers.Encoding)
    assert [row.ids for row in encoding[0:2]] == encoding["input_ids"][:2]


def test_what_is_done_after_the_call_changes_nothing():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)
    expected = tokenizer(["Save it", "a"], padding=True).encodings[:]
    encoding = tokenizer(["Save it", "a"], padding=True)
    encoding["input_ids"][0].clear()
    tokenizer.padding_side = "left"
    tokenizer.add_tokens(["Save"])
    for index, row in enumerate(expected):
        assert answers(encoding, index, 8) == answers(BatchEncoding({}, expected), index, 8)
        assert encoding[index].tokens == row.tokens


def test_pickles_and_copies():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)
    encoding = tokenizer(["Save it", "a"], return_tensors="pt", padding=True)
    pickled = pickle.dumps(encoding)
    assert len(pickled) < 5000
    for again in (pickle.loads(pickled), copy.deepcopy(encoding), copy.copy(encoding), encoding.to("cpu")):
        assert again.word_ids(0) == encoding.word_ids(0)
        assert again.char_to_token(0, 5) == encoding.char_to_token(0, 5)
    ids = tokenizer([7, 8])
    assert pickle.loads(pickle.dumps(ids))["input_ids"] == ids["input_ids"]


def test_ids_have_no_words():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)
    for batch in (([7, 8],), ("Save", tokenizer.tokenize("Save"))):
        with pytest.raises(ValueError, match=r"such as word_ids\(\), need text, not the ids \[.*\]: pass strings"):
            tokenizer(*batch).word_ids()
    assert tokenizer([], is_split_into_words=True).word_ids() == [None, None]
    assert tokenizer("").word_ids() == [None, None]


def test_sampled_tokens_are_those_of_the_call():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, sp_model_kwargs={"enable_sampling": True, "alpha": 0.1})
    for _ in range(20):
        encoding = tokenizer("password confirmation")
        assert encoding[0].ids == encoding["input_ids"]
        assert encoding.word_to_chars(1) == (9, 21)


def test_lower_case_by_a_normalizer():
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)
    assert tokenizer.backend_tokenizer.normalizer is None
    for normalizer in (normalizers.Lowercase(), normalizers.Sequence([normalizers.Lowercase()])):
        tokenizer.backend_tokenizer.normalizer = normalizer
        assert isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.Lowercase)
        assert tokenizer.tokenize("SAVE") == tokenizer.tokenize("save")
        tokenizer.backend_tokenizer.normalizer = None
        assert tokenizer.tokenize("SAVE") != tokenizer.tokenize("save")
    with pytest.raises(ValueError, match=r"normalizer=.*: SentencePiece normalizes .* Only Lowercase can be added"):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert not tokenizer.do_lower_case
