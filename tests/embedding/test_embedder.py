"""`Embedder` by itself, and under Ray Data, where a worker is killed."""

import json
import os
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import erniem_fast
from erniem_fast.embedding import Embedder
from tests import ROOT
from tests.golden import cases
from tests.integration.texts import TEXTS

COUNT = 64


@pytest.fixture(scope="module")
def vectors():
    return erniem_fast.embed(erniem_fast.ErnieMModel.from_pretrained(cases.TINY), TEXTS)


def test_a_batch_gets_a_column_more(vectors):
    threads = torch.get_num_threads()
    batch = {"id": np.arange(len(TEXTS)), "title": np.array(TEXTS, dtype=object)}
    found = Embedder(str(cases.TINY), column="title", output_column="vector")(batch)
    assert list(found) == ["id", "title", "vector"]
    np.testing.assert_allclose(found["vector"], vectors, rtol=0, atol=1e-6)
    assert torch.get_num_threads() == threads


def test_options(monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "")  # put back afterwards
    threads = torch.get_num_threads()
    try:
        embedder = Embedder(str(cases.TINY), weights="int8", threads=3, pooling="cls", normalize=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    expected = erniem_fast.embed(embedder.model, TEXTS, pooling="cls", normalize=False)
    np.testing.assert_allclose(embedder({"text": TEXTS})["embedding"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="column='text' is not in the rows; they have body"):
        embedder({"body": TEXTS})
    with pytest.raises(TypeError, match="batch is of type list; pass batch_format='numpy'"):
        embedder(TEXTS)
    with pytest.raises(ValueError, match="output_column='embedding' is in the rows already"):
        embedder({"text": TEXTS, "embedding": TEXTS})
    with pytest.raises(ValueError, match="pooling='median' is unknown"):
        Embedder(str(cases.TINY), pooling="median")
    with pytest.raises(ValueError, match="dtype='int8' is unknown; use 'float32'"):
        Embedder(str(cases.TINY), dtype="int8")


class Killed(Embedder):
    """Dies at its second batch, once among all workers; its rows tell how many threads their worker had."""

    def __init__(self, marker, **options):
        super().__init__(**options)
        self.marker, self.calls = marker, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 2:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return {**super().__call__(batch), "threads": np.full(len(batch["id"]), torch.get_num_threads())}


@pytest.fixture(scope="module")
def ray():
    """A cluster of this machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
        pytest.importorskip("ray.data")
        settings = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
        ray.init(
            num_cpus=4, include_dashboard=False, object_store_memory=2**27, runtime_env=settings, log_to_driver=False
        )
        yield ray
        ray.shutdown()


def test_a_killed_worker_loses_no_row(ray, vectors, tmp_path):
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = [{"id": index, "text": TEXTS[index % len(TEXTS)]} for index in range(COUNT)]
    embedded = ray.data.from_items(rows, override_num_blocks=8).map_batches(
        Killed,
        fn_constructor_kwargs={"model": str(cases.TINY), "marker": str(tmp_path / "killed")},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=2,
        batch_size=4,
    )
    found = embedded.take_all()
    assert (tmp_path / "killed").exists()
    assert [row["id"] for row in found] == list(range(COUNT)), "each row once, and in order"
    assert {row["threads"] for row in found} == {2}
    expected = np.resize(vectors, (COUNT, vectors.shape[1]))
    np.testing.assert_allclose(np.stack([row["embedding"] for row in found]), expected, rtol=0, atol=1e-6)


def test_the_example(ray, vectors, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"n": n, "body": text}) + "\n" for n, text in enumerate(TEXTS))
    )
    main = runpy.run_path(str(ROOT / "examples/ray_embed.py"))["main"]
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["--model", str(cases.TINY), *paths, "--column", "body", "--batch-size", "5", "--keep-order"]) == 0
    table = (
        pytest.importorskip("pyarrow.dataset")
        .dataset(sorted(map(str, Path(tmp_path / "out").glob("*.parquet"))))
        .to_table()
    )
    assert table["n"].to_pylist() == list(range(len(TEXTS)))
    np.testing.assert_allclose(table["embedding"].to_pylist(), vectors, rtol=0, atol=1e-6)
