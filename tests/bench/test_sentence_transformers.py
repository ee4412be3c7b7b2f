"""The benchmarks of sentence-transformers' models: their jobs, and whole runs on the tiny checkpoint."""

import numpy as np
import pytest
import torch
from runs import TINY
from transformers import AutoModel, AutoTokenizer

import erniem_fast
from bench.model import faces, lines
from bench.model import sentence_transformers as bench
from bench.model.figures import EncodeRun, LinesFigures, LinesRun
from bench.record import read

pytest.importorskip("sentence_transformers", reason="the extra `integrations` is not installed")


def test_fill_is_that_of_batches_sorted_by_characters():
    items = ["a" * (40 - index) for index in range(34)]  # batches of 32 and of 2
    lengths = [10, *[5] * 31, 4, 3]
    assert bench.fill(items, lengths) == sum(lengths) / (32 * 10 + 2 * 4)
    assert bench.fill(items[::-1], lengths[::-1]) == sum(lengths) / (32 * 10 + 2 * 4)
    assert bench.fill([("aa", "b"), ("a", "")], [3, 1]) == 4 / 6


def test_jobs_have_the_items_that_were_asked_for():
    encode, query, rank = bench.make_jobs(10, 4)
    assert [len(job.items) for job in (encode, query, rank)] == [10, 1, 4]
    assert all(text.startswith("query: ") for text in encode.items + query.items)
    assert len({question for question, _ in rank.items}) == 1
    assert len(set(map(len, rank.items))) == 1
    assert bench.make_jobs(10, 4)[0] == encode


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    faces.save(TINY, folder)
    return folder


def test_faces_compute_what_the_checkpoint_does(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved / "bare")
    assert tokenizer.get_vocab() == erniem_fast.ErnieMTokenizer.from_pretrained(TINY).get_vocab()
    assert tokenizer.model_max_length == 512
    batch = tokenizer(["Kennwort geändert", "a"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours = erniem_fast.ErnieMModel.from_pretrained(TINY).eval()(**batch).last_hidden_state
        theirs = AutoModel.from_pretrained(saved / "bare").eval()(**batch).last_hidden_state
        encoder = faces.load_reranker(saved / "reranker").model.roberta(**batch).last_hidden_state
    real = batch["attention_mask"] == 1
    for each in (theirs, encoder):
        torch.testing.assert_close(each[real], ours[real], rtol=0, atol=1e-5)


def test_a_run(tmp_path):
    options = ["--texts", "6", "--pairs", "3", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)]
    assert bench.main(["--model", str(TINY), *options]) == 0
    run = read(EncodeRun, tmp_path / "encode-tiny-float32.json")
    assert [job.items for job in run.jobs] == [6, 1, 3]
    for job in run.jobs:
        stock, *others = job.contenders
        assert (stock.name, stock.difference, stock.speedup.median) == ("stock", 0, 1)
        assert {each.name.partition(", ")[2] for each in others} >= {"float32", "packed", "int8"}
        assert all(each.difference < bench.LARGEST["int8"] for each in others)
    assert "batches of 32 are" in (tmp_path / "encode-tiny-float32.md").read_text()
    assert (tmp_path / "encode-tiny-float32.png").exists()


def test_wrong_results_are_not_timed():
    job = bench.Job("job", "bare", ["a"])
    calls = {"stock": (None, lambda: np.ones((1, 2))), "encode": (None, lambda: np.full((1, 2), 1.001))}
    with pytest.raises(ValueError, match=r"job: encode is off by 0.001 of the results' root mean square"):
        bench.compare(job, None, calls, rounds=1)


def test_lines(tmp_path):
    assert lines.main(["--model", str(TINY), "--lines", "40", "--threads", "1", "--output", str(tmp_path)]) == 0
    run = read(LinesRun, tmp_path / "lines-tiny-float32.json")
    assert [(each.lines, each.way) for each in run.results] == [(40, "encode"), (40, "embed")]
    assert all(each.peak_memory >= each.loaded_memory > 2**27 for each in run.results)
    assert (tmp_path / "lines-tiny-float32.png").exists()


def test_rounds_are_joined():
    rounds = [LinesFigures(9, "embed", [2.0], 10, 30), LinesFigures(9, "embed", [4.0], 20, 25)]
    assert lines.join(rounds) == LinesFigures(9, "embed", [2.0, 4.0], 20, 30)
    assert lines.join(rounds).median == 3
