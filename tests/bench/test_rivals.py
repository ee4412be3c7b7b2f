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


def test_graphs_take_part_on_a_gpu():
    original = [rivals.rivals("original", device, "bfloat16") for device in ("cpu", "cuda")]
    assert original == [(rivals.OURS, rivals.ORIGINAL), (rivals.OURS, rivals.OURS_GRAPHS, rivals.ORIGINAL)]
    everything = [rivals.rivals("all", device, "bfloat16") for device in ("cpu", "cuda:1")]
    assert [rivals.OURS_GRAPHS in peers for peers in everything] == [False, True]
    forms = [{peer.weights for peer in peers if peer.name.startswith(rivals.OURS.name)} for peers in everything]
    assert forms == [{None, "packed", "bfloat16", "int8"}, {None, "int8", "float8"}]


def test_those_that_round_are_compared_apart_from_those_that_do_not():
    unrounded, rounded = (rivals.rivals(against, "cpu", "float32") for against in ("unrounded", "rounded"))
    assert unrounded[0] is rounded[0] is rivals.OURS
    assert {peer.weights for peer in unrounded} == {None, "packed"}
    assert {peer.weights for peer in rounded[1:]} == {"bfloat16", "int8"}
    both, every = [*unrounded, *rounded[1:]], rivals.rivals("all", "cpu", "float32")
    assert sorted(peer.name for peer in both) == sorted(peer.name for peer in every)
    assert {peer.name for peer in every if peer.python == rivals.OURS_PYTHON} == {
        "XLM-R, optimize",
        *(name for name in rivals.OURS_NAMES if not name.endswith("float8")),
    }


def test_every_peer_has_a_worker():
    for peer in (*rivals.ALL, *rivals.ON_CUDA):
        option, module, *_ = peer.command
        assert (option, importlib.util.find_spec(module) is None) == ("-m", False)
