"""The workers' models compute what ours does, and their exports are made once."""

import itertools
import json
import pathlib
import types

import pytest
import torch
import torch.nn.functional as F
from runs import TINY

from bench.model.jobs import pad
from bench.model.workers import exports_folder
from bench.peers import exports, packed, xlm_roberta
from bench.peers.ours import ErnieMFast
from bench.peers.transformers5 import Transformers5
from erniem_fast import ErnieMModel

RAGGED = {name: torch.tensor(rows) for name, rows in pad([[5] * 9, [7, 8, 9], [6]]).items()}

REAL = RAGGED["attention_mask"].bool()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.inference_mode()
def test_xlm_roberta_with_our_weights_computes_what_we_do(attention):
    ours = ErnieMModel.from_pretrained(TINY).eval()(**RAGGED)
    theirs = xlm_roberta.load(TINY, torch.float32, attention).eval()(**RAGGED)
    # Seen: 1e-6, of values around 1.
    torch.testing.assert_close(theirs.last_hidden_state[REAL], ours.last_hidden_state[REAL], rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.pooler_output, ours.pooler_output, rtol=0, atol=1e-5)


def test_the_packed_rival_computes_what_we_do(monkeypatch):
    def one_by_one(q, k, v, cu_seqlens, longest):
        """Stands for varlen_attn, which needs a GPU."""
        bounds = cu_seqlens.tolist()
        assert longest == max(end - start for start, end in itertools.pairwise(bounds))
        rows = [[x[start:end].transpose(0, 1) for x in (q, k, v)] for start, end in itertools.pairwise(bounds)]
        return torch.cat([F.scaled_dot_product_attention(*row).transpose(0, 1) for row in rows])

    monkeypatch.setattr(packed, "varlen", one_by_one)
    peer = packed.PackedPeer("varlen")
    peer.load(TINY, "cpu", "float32", 1)
    ours = ErnieMModel.from_pretrained(TINY).eval()
    with torch.inference_mode():
        theirs = peer.forward(RAGGED)
        torch.testing.assert_close(theirs[REAL], ours(**RAGGED).last_hidden_state[REAL], rtol=0, atol=1e-5)


def test_masked_words_are_predicted_alike():
    """A step of training by our loss moves the hidden states as one by the loss over all tokens does."""
    found = []
    for peer in (ErnieMFast(), Transformers5("sdpa")):
        peer.load(TINY, "cpu", "float32", 1)
        before = peer.forward(RAGGED)
        peer.masked = True
        found.append((before, peer.learn(RAGGED)))
        peer.train(RAGGED)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours[REAL], theirs[REAL], rtol=0, atol=1e-5)
    assert (found[0][1] - found[0][0])[REAL].abs().max() > 1e-3


def test_a_checkpoint_with_a_head_lends_its_encoder(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    state = ErnieMModel.from_pretrained(TINY).state_dict()
    head = {"classifier.weight": torch.zeros(2, 64)}
    torch.save(
        {**{f"ernie_m.{name}": tensor for name, tensor in state.items()}, **head}, tmp_path / "pytorch_model.bin"
    )
    loaded = xlm_roberta.load(tmp_path, torch.float32, "sdpa").state_dict()
    expected = xlm_roberta.load(TINY, torch.float32, "sdpa").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_an_export_is_made_once(tmp_path, monkeypatch):
    calls = []

    def make(command):
        calls.append(command[1:])
        pathlib.Path(command[-1], "model.onnx").touch()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(exports.subprocess, "run", make)
    for _ in range(2):
        assert (exports.exported("onnx", "model", tmp_path) / "model.onnx").exists()
    assert calls == [["-m", "bench.peers.exports", "onnx", "model", tmp_path / "onnx.unfinished"]]
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_batches_to_calibrate_on_lie_beside_the_exports():
    batches = [pad([[5, 6], [7]])]
    with exports_folder(batches) as folder:
        assert json.loads(pathlib.Path(folder, exports.CALIBRATION).read_text()) == batches
    assert not pathlib.Path(folder).exists()


def test_an_export_that_fails_leaves_nothing_to_be_taken_for_one(tmp_path):
    with pytest.raises(SystemExit, match="the checkpoint could not be exported as nonsense"):
        exports.exported("nonsense", "model", tmp_path)
    assert not (tmp_path / "nonsense").exists()
