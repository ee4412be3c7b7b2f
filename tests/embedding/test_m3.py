"""bge-m3's heads on packed tokens, beside their formulas on each text alone."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import erniem_fast
from erniem_fast.embedding import batches, embed_m3
from tests.embedding.tiny import ALL, LIMIT

ALL_KINDS = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
DIMENSION = 7


@pytest.fixture(scope="module")
def stock(checkpoint):
    return AutoModel.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def heads(stock, tmp_path_factory):
    """A folder with the heads."""
    folder, hidden = tmp_path_factory.mktemp("heads"), stock.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    for name, features in (("sparse_linear.pt", 1), ("colbert_linear.pt", DIMENSION)):
        weight = torch.randn(features, hidden, generator=generator)
        bias = torch.full((features,), 2.0)  # so that many weights are above 0
        torch.save({"weight": weight, "bias": bias}, folder / name)
    return folder


@pytest.fixture(scope="module")
def expected(stock, checkpoint, heads, family):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sparse, colbert = (torch.load(heads / f"{name}_linear.pt", weights_only=True) for name in ("sparse", "colbert"))
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    dense, weights, vectors = [], [], []
    for text in ALL:
        encoded = tokenizer(text, truncation=True, max_length=LIMIT[family], return_tensors="pt")
        with torch.inference_mode():
            hidden = stock(**encoded).last_hidden_state[0]
        dense.append(torch.nn.functional.normalize(hidden[0], dim=0).numpy())
        by_token = torch.relu(hidden @ sparse["weight"].T + sparse["bias"])[:, 0]
        ids = encoded["input_ids"][0]
        weights.append(
            {
                str(id): by_token[ids == id].max().item()
                for id in ids.tolist()
                if id not in unused and by_token[ids == id].max() > 0
            }
        )
        each = hidden[1:] @ colbert["weight"].T + colbert["bias"]
        vectors.append((each / each.norm(dim=-1, keepdim=True)).numpy())
    return np.stack(dense), weights, vectors


def check(found, expected):
    dense, weights, vectors = expected
    np.testing.assert_allclose(found["dense_vecs"], dense, rtol=0, atol=2e-6)
    assert len(found["lexical_weights"]) == len(weights)
    for own, theirs in zip(found["lexical_weights"], weights, strict=True):
        assert own == pytest.approx(theirs, abs=1e-4)
    for own, theirs in zip(found["colbert_vecs"], vectors, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_optimised", [True, False], ids=["packed", "stock"])
def test_all_kinds(stock, heads, expected, is_optimised):
    assert any(len(each) > 3 for each in expected[1])
    model = copy.deepcopy(stock)
    if is_optimised:
        erniem_fast.optimize(model)
    check(embed_m3(model, ALL, checkpoint=str(heads), tokens_per_batch=200, **ALL_KINDS), expected)


def test_a_stream(stock, heads, expected, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW_TEXTS", 5)
    parts = list(embed_m3(stock, iter(ALL), checkpoint=str(heads), **ALL_KINDS))
    assert [len(part["dense_vecs"]) for part in parts] == [5, 5, 5, 5, 2]
    joined = {kind: [each for part in parts for each in part[kind]] for kind in parts[0]}
    check(joined, expected)


def test_what_is_asked_for(stock, heads):
    assert list(embed_m3(stock, ["a"])) == ["dense_vecs"]
    found = embed_m3(stock, [], checkpoint=str(heads), **ALL_KINDS)
    assert found["dense_vecs"].shape == (0, stock.config.hidden_size)
    assert found["lexical_weights"] == found["colbert_vecs"] == []
    with pytest.raises(ValueError, match="Nothing is to be returned; set one of return_dense, return_sparse"):
        embed_m3(stock, ["a"], return_dense=False)


def test_heads_that_are_missing_or_of_another_size(stock, heads, tmp_path):
    with pytest.raises(ValueError, match=r"has no sparse_linear.pt, as bge-m3 has"):
        embed_m3(stock, ["a"], return_sparse=True)
    torch.save({"weight": torch.zeros(1, 5)}, tmp_path / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"sparse_linear.pt is for a hidden size of 5, but the model's is"):
        embed_m3(stock, ["a"], return_sparse=True, checkpoint=str(tmp_path))
