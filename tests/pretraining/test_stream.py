"""Streams: budgets, shards, shares of tasks, and going on after any batch."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.worker import WorkerInfo

from erniem_fast.pretraining import MMLM, TLM, PretrainingStream, Task, TextFiles
from tests.pretraining.parallel import LANGUAGES, PAIRS, SENTENCES, read_pairs, tasks

SOME = SENTENCES[:60]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def sentences_of(batches):
    """The ids of single sentences, in their order."""
    found = []
    for batch in batches:
        ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[0]
        found += [tuple(ids[start:end].tolist()) for start, end in batch["cu_seq_lens_q"].unfold(0, 2, 1).tolist()]
    return found


def ids_of(sentences, tokenizer):
    return [tuple(tokenizer(sentence.text)["input_ids"]) for sentence in sentences]


def make_stream(tokenizer, **options):
    return PretrainingStream(tasks(tokenizer, languages=LANGUAGES), 256, **{"shuffle": 20, **options})


def test_batches_are_full(tokenizer):
    """A batch takes samples until the next one, 64 tokens long at most, does not fit."""
    for batch in islice(make_stream(tokenizer), 30):
        assert 256 - 64 < batch["input_ids"].shape[1] <= 256
        assert batch["cu_seq_lens_q"].diff().max() == batch["max_length_q"] <= 64


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shuffle", [1, 16])
def test_every_record_comes_once_an_epoch(shards, shuffle, tokenizer):
    """In one of the shards; in order only without shuffling."""
    found = []
    for shard in range(shards):
        task = Task(MMLM(tokenizer=tokenizer, max_length=128), SOME)
        options = {"shard": shard, "shards": shards, "shuffle": shuffle, "epochs": 2}
        ids = sentences_of(PretrainingStream([task], 128, **options))
        in_order = ids_of(SOME[shard::shards] * 2, tokenizer)
        assert (ids == in_order) is (shuffle == 1)
        found += ids
    assert Counter(found) == Counter(ids_of(SOME * 2, tokenizer))


def test_seeds_and_shards_differ(tokenizer):
    streams = [{}, {}, {"seed": 1}, {"shards": 2}, {"shards": 2, "shard": 1}]
    first = [next(iter(make_stream(tokenizer, **options)))["input_ids"].tolist() for options in streams]
    assert first[0] == first[1]
    assert len(set(map(str, first[1:]))) == 4


def test_weights(tokenizer):
    """Three of four records come from the heavier task (standard deviation of the share: 0.008)."""
    options = {"tokenizer": tokenizer, "max_length": 64}
    mixed = [Task(MMLM(**options), SENTENCES, 3), Task(TLM(**options), PAIRS)]
    ids = torch.cat([batch["objective_ids"] for batch in islice(PretrainingStream(mixed, 1024), 80)])
    assert len(ids) > 2000
    assert (ids == 0).float().mean() == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("batches", [0, 1, 7, 40])
def test_goes_on_after_any_batch(batches, tokenizer):
    """With the same batches, over ends of epochs too; the state survives JSON, and torch.load of weights alone."""
    mixed = tasks(tokenizer, languages=LANGUAGES)
    mixed[1] = Task(mixed[1].objective, read_pairs())
    stream, again = (PretrainingStream(mixed, 256, shuffle=20) for _ in range(2))
    running = iter(stream)
    list(islice(running, batches))
    state = json.loads(json.dumps(stream.state_dict()))
    expected = list(islice(running, 10))
    again.load_state_dict(state)
    assert json.loads(json.dumps(again.state_dict())) == state
    assert_equal(list(islice(again, 10)), expected)


def test_a_finished_stream_stays_finished(tokenizer):
    stream = make_stream(tokenizer, epochs=1)
    whole = list(stream)
    again = make_stream(tokenizer, epochs=1)
    again.load_state_dict(stream.state_dict())
    assert list(again) == []
    assert_equal(list(again), whole)


def test_files_are_not_read_from_their_beginning(tokenizer, tmp_path):
    """To go on: nothing before the place in the state is read again."""
    path = tmp_path / "texts"
    path.write_text("\n".join(record.text for record in SOME * 3), encoding="utf-8")
    stream = PretrainingStream([Task(MMLM(tokenizer=tokenizer, max_length=128), TextFiles(path))], 128, shuffle=1)
    running = iter(stream)
    list(islice(running, 5))
    state = stream.state_dict()
    expected = list(islice(running, 5))
    offset, content = state["readers"][0]["source"]["offset"], path.read_bytes()
    path.write_bytes(b"\xff" * offset + content[offset:])
    stream.load_state_dict(state)
    assert_equal(list(islice(stream, 5)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers, tokenizer):
    """Workers share the records out: each comes once an epoch."""
    stream = PretrainingStream([Task(MMLM(tokenizer=tokenizer, max_length=128), SOME)], 128, epochs=1)
    found = sentences_of(DataLoader(stream, batch_size=None, num_workers=workers))
    assert Counter(found) == Counter(sentences_of(stream))
    assert len(found) == len(SOME)


def test_a_few_records_of_many_without_samples(tokenizer):
    """They are passed over, though a buffer larger than the source has read many epochs when the first one is drawn."""
    texts, objective = ["", " ", "[SEP]", *["Log in"] * 2], MMLM(tokenizer=tokenizer, max_length=16)
    for seed in range(40):
        batch = next(iter(PretrainingStream([Task(objective, texts)], 16, seed=seed)))
        assert sentences_of([batch])[0] == tuple(tokenizer("Log in")["input_ids"])


@pytest.mark.parametrize("shuffle", [1, 20])
@pytest.mark.parametrize("others", [False, True])
def test_a_source_without_samples(shuffle, others, tokenizer):
    """It is refused, also beside one that has some, which would hide that it takes no part."""
    objective = MMLM(tokenizer=tokenizer, max_length=16)
    mixed = [Task(objective, [""] * 30), *([Task(objective, ["Log in"])] if others else [])]
    with pytest.raises(ValueError, match="No record of the source of mmlm makes a sample"):
        list(islice(PretrainingStream(mixed, 16, shuffle=shuffle), 2000))


class OfEachWorker(IterableDataset):
    """As those of `datasets`: in a worker only its share."""

    def __iter__(self):
        worker = get_worker_info()
        yield from SOME[worker.id :: worker.num_workers] if worker else SOME


def test_sources_that_know_of_workers(tokenizer):
    """They are read whole; the stream shares them out, among ranks too."""
    found = Counter()
    for shard in range(2):
        task = Task(MMLM(tokenizer=tokenizer, max_length=128), OfEachWorker())
        stream = PretrainingStream([task], 128, epochs=1, shard=shard, shards=2)
        loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
        passes = [Counter(sentences_of(loader)) for _ in range(2)]
        assert passes[0] == passes[1]
        found += passes[0]
    assert found == Counter(ids_of(SOME, tokenizer))


def test_each_worker_goes_on(tokenizer):
    """As torchdata's StatefulDataLoader does it: each has a copy of the stream, and its state."""
    started, resumed = (make_stream(tokenizer, epochs=2) for _ in range(2))
    for worker in range(2):
        info = WorkerInfo(id=worker, num_workers=2, seed=0, dataset=started)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.data._utils.worker, "_worker_info", info)
            running = iter(started)
            list(islice(running, 5))
            resumed.load_state_dict(started.state_dict())
            assert_equal(list(islice(resumed, 10)), list(islice(running, 10)))


def test_the_state_of_another_part_is_refused(tokenizer):
    state = make_stream(tokenizer, shards=2).state_dict()
    for options in ({}, {"shards": 2, "shard": 1}, {"shards": 3}):
        stream = make_stream(tokenizer, **options)
        stream.load_state_dict(state)
        with pytest.raises(ValueError, match=r"a stream with place \[0, 2\], and this one has"):
            next(iter(stream))
    stream = PretrainingStream(tasks(tokenizer)[:2], 256, shards=2)
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"with objectives \['mmlm', .*\], and this one has \['mmlm', 'tlm'\]"):
        next(iter(stream))


def test_what_is_refused(tokenizer):
    task = Task(MMLM(tokenizer=tokenizer, max_length=64), SOME)
    for arguments, message in (
        (([],), "tasks must be at least one"),
        (([task], 63), "token_budget=63 is less than max_length=64"),
    ):
        with pytest.raises(ValueError, match=message):
            PretrainingStream(*arguments)
    with pytest.raises(ValueError, match=r"epochs=0 at least 1"):
        PretrainingStream([task], epochs=0)
    with pytest.raises(ValueError, match=r"source is a text, which yields letters; pass TextFiles"):
        PretrainingStream([Task(task.objective, "texts.txt")])
    with pytest.raises(ValueError, match="No record of the source of mmlm makes a sample"):
        next(iter(PretrainingStream([Task(task.objective, ["", "[SEP]"])])))
    with pytest.raises(ValueError, match=r"shard=2 must be in \[0, shards=2\)"):
        PretrainingStream([task], shard=2, shards=2)
    with pytest.raises(ValueError, match="yields 60 records, so that shard 60 of 61 gets none"):
        next(iter(PretrainingStream([task], shard=60, shards=61)))
    with pytest.raises(ValueError, match="yields 0 records"):
        list(PretrainingStream([Task(task.objective, iter(()))]))
