"""The batches that peers run: their number, their lengths, and the text that they are made of."""

import pytest
from runs import TINY

from bench.model.jobs import Spec, make_jobs
from bench.model.text import text_encoder


def test_jobs_hold_the_same_rows_for_every_batch_size():
    specs = [Spec(size, lengths, 8, 1) for size in (4, 1) for lengths in ("modernbert", "fixed:7")]
    jobs = make_jobs(specs, encode=None, vocab_size=100, max_length=300)
    names = ["4 x modernbert", "4 x fixed:7", "1 x modernbert", "1 x fixed:7"]
    assert [(job.name, len(job.batches)) for job in jobs] == list(zip(names, [2, 2, 8, 8], strict=True))
    assert [job.tokens for job in jobs] == [jobs[2].tokens, 56, jobs[2].tokens, 56]
    assert jobs[2].positions == jobs[2].tokens < jobs[0].positions
    rows = [row for job in jobs for batch in job.batches for row in batch["input_ids"]]
    assert min(id for row in rows for id in row if id != 1) == 4
    assert max(map(len, rows)) == 300
    (short,) = make_jobs([Spec(1, "modernbert", 2, 1)], encode=None, vocab_size=100, max_length=300)
    assert short.batches == jobs[2].batches[:2]


def test_a_turn_has_one_batch_at_least_and_16_at_most():
    specs = [Spec(size, "fixed:2", 64, 1) for size in (1, 32, 100)]
    jobs = make_jobs(specs, encode=None, vocab_size=100, max_length=300)
    assert [len(job.batches) for job in jobs] == [16, 2, 1]


def test_rows_are_padded_to_the_longest():
    (job,) = make_jobs([Spec(2, "text", 2, 1)], lambda texts: [[5] * 3, [6] * 2], vocab_size=100, max_length=4)
    assert job.batches == [{"input_ids": [[5, 5, 5], [6, 6, 1]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}]


def test_real_text_fills_a_batch_of_32_to_about_45_percent():
    encode = text_encoder(TINY, max_length=512)
    (job,) = make_jobs([Spec(32, "text", 64, 1)], encode, vocab_size=2300, max_length=512)
    assert job.fill == pytest.approx(0.45, abs=0.005)


def test_sorted_text_stands_for_many_batches_and_is_nearly_full():
    encode = text_encoder(TINY, max_length=512)
    (job,) = make_jobs([Spec(32, "sorted", 64, 1)], encode, vocab_size=2300, max_length=512)
    lengths = [sum(row) for batch in job.batches for row in batch["attention_mask"]]
    assert len(lengths) == 64
    assert lengths == sorted(lengths)
    assert job.fill > 0.9


def test_real_text_is_cut_at_the_maximum():
    assert [len(row) for row in text_encoder(TINY, max_length=6)(["one " * 20])] == [6]
