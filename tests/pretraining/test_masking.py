"""Which tokens are chosen, and what stands in their place."""

from random import Random

import pytest

from erniem_fast.pretraining import Masking

IDS = [0, *range(10, 1010), 3, 2]


def test_shares(tokenizer):
    """As many tokens as the rate says, of which 80 % are masked, 10 % are others and 10 % are left."""
    random, masked, others, left = Random(1), 0, 0, 0
    for _ in range(20):
        ids, labels = Masking().apply(IDS, tokenizer, random)
        chosen = [place for place, label in enumerate(labels) if label != -100]
        assert len(chosen) == 150
        assert all(labels[place] == IDS[place] for place in chosen)
        assert all(ids[place] == IDS[place] for place in set(range(len(IDS))) - set(chosen))
        masked += sum(ids[place] == tokenizer.mask_token_id for place in chosen)
        left += sum(ids[place] == IDS[place] for place in chosen)
    others = 3000 - masked - left
    # Standard deviations of the three: 22, 16 and 16.
    assert masked == pytest.approx(2400, abs=110)
    assert others == pytest.approx(300, abs=82)
    assert left == pytest.approx(300, abs=82)


@pytest.mark.parametrize(("ids", "expected"), [([0, 3, 2], 0), ([0, 7, 2], 1), ([], 0)])
def test_special_tokens_are_never_chosen(tokenizer, ids, expected):
    """And one token of a text is, however short it is."""
    assert len(Masking().choose(ids, tokenizer, Random(1))) == expected


@pytest.mark.parametrize("shares", [{"rate": 1.5}, {"mask": -0.1}, {"mask": 0.8, "random": 0.3}])
def test_wrong_shares(shares):
    with pytest.raises(ValueError, match="=" + str(next(iter(shares.values())))):
        Masking(**shares)
