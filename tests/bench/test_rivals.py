"""Which peers take part in a run."""

import importlib.util

from bench.model import rivals


def test_an_ablation_switches_off_each_kernel_that_runs_here(monkeypatch):
    chosen = {"embeddings": "native", "attention": "triton", "bias_gelu": "torch", "add_norm": "reference"}
    monkeypatch.setattr(rivals, "choose", lambda op, device, dtype: chosen[op])
    ours, *variants = rivals.rivals("itself", "cpu", "float32")
    assert ours is rivals.OURS
    off = {"ERNIEM_FAST_KERNELS": "off"}
    assert {variant.name: variant.environment for variant in variants} == {
        "embeddings not by native": {"ERNIEM_FAST_EMBEDDINGS": "torch"},
        "attention not by triton": {"ERNIEM_FAST_ATTENTION": "torch"},
        "embeddings by native alone": {**off, "ERNIEM_FAST_EMBEDDINGS": "native"},
        "attention by triton alone": {**off, "ERNIEM_FAST_ATTENTION": "triton"},
        "no kernels": off,
        "no packing": {"ERNIEM_FAST_PACKING": "0"},
        "no kernels, no packing": {**off, "ERNIEM_FAST_PACKING": "0"},
    }


def test_every_peer_has_a_worker():
    for peer in (*rivals.ALL, *rivals.ON_CUDA):
        option, module, *_ = peer.command
        assert (option, importlib.util.find_spec(module) is None) == ("-m", False)
