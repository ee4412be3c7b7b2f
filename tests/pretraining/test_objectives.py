"""The samples that the objectives make, and who sees whom in them."""

import logging
from random import Random

import numpy as np
import pytest
import torch

from erniem_fast import ErnieMTokenizer
from erniem_fast.pretraining import BTMLM, CAMLM, MMLM, TLM, Masking, Pair, Sentence
from tests.golden import cases
from tests.pretraining.parallel import LANGUAGES, PAIRS, SENTENCES, objectives

PAIR = Pair("Your password was changed.", "Ihr Passwort wurde geändert.", "en", "de")


def restored(sample):
    """The ids before masking, in the order of positions."""
    ids = [label if label != -100 else each for each, label in zip(sample.input_ids, sample.labels, strict=True)]
    return [each for _, each in sorted(zip(sample.position_ids, ids, strict=True))]


@pytest.mark.parametrize("kind", [TLM, CAMLM])
def test_pairs_are_those_of_the_tokenizer(kind, tokenizer):
    for pair in PAIRS:
        (sample,) = kind(tokenizer=tokenizer).samples(pair, Random(1))
        assert restored(sample) == tokenizer(pair.source, pair.target)["input_ids"]


def test_nothing_of_a_long_text_is_lost(tokenizer):
    """It becomes pieces, for MMLM as long as allowed, for BTMLM with room for their pseudo tokens."""
    text = " ".join(sentence.text for sentence in SENTENCES)
    ids = tokenizer(text)["input_ids"][1:-1]
    mmlm = MMLM(tokenizer=tokenizer, max_length=64).samples(Sentence(text), Random(1))
    assert [each for sample in mmlm for each in restored(sample)[1:-1]] == ids
    assert {len(sample) for sample in mmlm[:-1]} == {64}
    btmlm = BTMLM(tokenizer=tokenizer, max_length=64, share=0.5).samples(Sentence(text), Random(1))
    assert [each for sample in btmlm for each in restored(sample)[1 : sample.source_length - 1]] == ids
    assert {len(sample.pseudo) for sample in btmlm[:-1]} == {20}
    assert all(len(sample) <= 64 for sample in btmlm)


def test_a_long_text_is_no_cause_for_a_warning(tokenizer, caplog, monkeypatch):
    """Its pieces have as many tokens as the model has positions."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})
    MMLM(tokenizer=tokenizer).samples(Sentence("Log in " * 400), Random(1))
    assert not caplog.records


def test_pairs_that_are_too_long_are_cut_as_by_the_tokenizer(tokenizer):
    long = Pair(" ".join([PAIR.source] * 20), PAIR.target)
    (sample,) = TLM(tokenizer=tokenizer, max_length=40).samples(long, Random(1))
    assert restored(sample) == tokenizer(*long[:2], truncation=True, max_length=40)["input_ids"]


def test_camlm_structure(tokenizer):
    """Each token's keys: a mask's are the other side's unmasked tokens and its own side's masks."""
    for pair in PAIRS[:10]:
        (sample,) = CAMLM(tokenizer=tokenizer, languages=LANGUAGES).samples(pair, Random(1))
        half = len(tokenizer(pair.source)["input_ids"])
        sides = [int(position >= half) for position in sample.position_ids]
        masked = [label != -100 for label in sample.labels]
        assert {sides[place] for place, each in enumerate(masked) if each} == {0, 1}
        assert all(
            (each == tokenizer.mask_token_id) == hidden for each, hidden in zip(sample.input_ids, masked, strict=True)
        )
        for place, (first, end) in enumerate(sample.key_ranges):
            keys = {
                key
                for key in range(len(sample))
                if (sides[key] == sides[place]) == (masked[key] == masked[place]) and (masked[place] or not masked[key])
            }
            assert keys == set(range(first, end))
        named = [LANGUAGES.index(each) for each in (pair.source_language, pair.target_language)]
        expected = [named[side] if hidden else -1 for side, hidden in zip(sides, masked, strict=True)]
        assert sample.language_ids == expected


def test_btmlm_samples(tokenizer):
    """Placeholders behind the text, in another language, one for each of its tokens."""
    drawn = set()
    for seed in range(20):
        (sample,) = BTMLM(tokenizer=tokenizer, languages=["de", "fr", "zh"]).samples(SENTENCE, Random(seed))
        text = tokenizer(SENTENCE.text)["input_ids"]
        assert restored(sample) == [*text, 2, *[tokenizer.mask_token_id] * (len(text) - 2), 2]
        assert sample.source_length == len(text)
        assert list(sample.pseudo) == list(range(len(text) + 1, 2 * len(text) - 1))
        assert all(label == -100 for label in sample.labels[sample.source_length :])
        named = {sample.language_ids[place] for place in sample.pseudo}
        assert len(named) == 1
        drawn |= named
        assert sample.language_ids.count(-1) == len(sample) - len(sample.pseudo)
    assert drawn == {1, 2}


@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_number_of_pseudo_tokens(share, tokenizer):
    """`share` for each token of the text, one at least."""
    for sentence in SENTENCES[:20]:
        (sample,) = BTMLM(tokenizer=tokenizer, share=share).samples(sentence, Random(1))
        assert len(sample.pseudo) == max(1, round(share * (sample.source_length - 2)))
        assert sample.language_ids is None


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_masking_is_that_of_the_objective(rate, tokenizer):
    """As many labels as the rate says, one of each text at least, and [MASK] in the place of all."""
    text = [each for each in tokenizer(SENTENCE.text)["input_ids"][1:-1] if each != tokenizer.unk_token_id]
    for kind in (MMLM, TLM, CAMLM, BTMLM):
        record = SENTENCE if kind.record is Sentence else Pair(SENTENCE.text, SENTENCE.text)
        masking = Masking(rate, mask=1.0, random=0.0)
        (sample,) = kind(tokenizer=tokenizer, masking=masking).samples(record, Random(1))
        chosen = [each for each, label in zip(sample.input_ids, sample.labels, strict=True) if label != -100]
        texts = {TLM: [2 * len(text)], CAMLM: [len(text), len(text)]}.get(kind, [len(text)])
        assert chosen == [tokenizer.mask_token_id] * sum(max(1, round(rate * length)) for length in texts)


SENTENCE = Sentence("Ihr Passwort wurde geändert.", "de")


@pytest.mark.parametrize("record", [SENTENCE.text, SENTENCE, list(SENTENCE), {"text": SENTENCE.text, "more": 1}])
def test_records(record, tokenizer):
    """A record's forms, all as a collator takes them; the same seed makes the same samples, another one others."""
    objective = MMLM(tokenizer=tokenizer)
    found, expected, other = (objective(*each) for each in (([record], np.int64(1)), ([SENTENCE], 1), ([record], 2)))
    assert torch.equal(found["labels"], expected["labels"])
    assert not torch.equal(found["labels"], other["labels"])


def test_a_collator_draws_from_torchs_generator(tokenizer):
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append([MMLM(tokenizer=tokenizer)(SENTENCES)["labels"] for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(*found[0])


def test_what_is_refused(tokenizer):
    mmlm, tlm, camlm, btmlm = objectives(tokenizer, languages=["en", "de"])
    with pytest.raises(ValueError, match="tlm needs records with source, target"):
        tlm([SENTENCE.text])
    with pytest.raises(ValueError, match="no samples to pack"):
        mmlm(["", "  "])
    with pytest.raises(ValueError, match=r"masking.mask=0.8 leaves chosen tokens visible"):
        CAMLM(tokenizer=tokenizer, masking=Masking())
    for objective, record in ((camlm, PAIR._replace(target_language="fr")), (btmlm, SENTENCE.text)):
        with pytest.raises(ValueError, match="none of languages="):
            objective([record])
    with pytest.raises(ValueError, match=r"languages=\['de'\] has no other"):
        BTMLM(tokenizer=tokenizer, languages=["de"])
    for wrong in ({"share": 0}, {"share": float("inf")}, {"temperature": float("nan")}, {"temperature": -1.0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=rf"{name}={value} must .* both finite"):
            BTMLM(tokenizer=tokenizer, **wrong)
    for languages in ("de", ["de", "fr", "de"]):
        with pytest.raises(ValueError, match="must be a list of names, none of them twice"):
            CAMLM(tokenizer=tokenizer, languages=languages)
    with pytest.raises(ValueError, match="records is a text, 'Log in'; pass a list"):
        mmlm("Log in")
    for record in (None, (3,), {"text": None}):
        with pytest.raises(ValueError, match="mmlm needs records with text, which are texts"):
            mmlm([record])


def test_other_tokenizers_are_refused():
    with pytest.raises(TypeError, match=r"of type object; use an ErnieMTokenizer\. For XLM-RoBERTa's"):
        MMLM(tokenizer=object())
    without = ErnieMTokenizer.from_pretrained(cases.TINY)
    without.mask_token = None
    with pytest.raises(ValueError, match="tokenizer has no mask_token"):
        MMLM(tokenizer=without)


@pytest.mark.parametrize("kind", [TLM, CAMLM])
def test_an_empty_side_is_no_translation(kind, tokenizer):
    for pair in (Pair("", "Log in"), Pair("Log in", " "), Pair("", "")):
        assert kind(tokenizer=tokenizer).samples(pair, Random(1)) == []
