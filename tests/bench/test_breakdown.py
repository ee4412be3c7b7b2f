"""Where the time goes: work counted by hand, and events that belong to ops."""

import types

import pytest
import torch
from runs import TINY
from torch.profiler import ProfilerActivity, profile

from bench import roofline
from bench.model import breakdown
from bench.model.figures import Breakdown
from bench.model.jobs import Spec
from bench.model.work import count_work
from bench.record import read
from erniem_fast import ErnieMConfig, ErnieMModel
from erniem_fast.matmul import linear
from tests.products import every_library, products_by


def test_the_work_of_an_op_is_counted_by_hand():
    config = ErnieMConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    model = ErnieMModel(config)
    work = count_work(model, [2, 3], training=False)
    # Five tokens and 13 pairs; four products of 8 x 8 and two of 8 x 16, two operations for each weight.
    assert work["matrix products"].flops == 3 * 5 * 2 * (4 * 64 + 2 * 128)
    assert work["attention"].flops == 3 * 13 * 2 * 2 * 8
    assert work["bias_gelu"].bytes == 3 * 2 * 5 * 16 * 4
    assert work["add_norm"].bytes == 3 * 2 * 3 * 5 * 8 * 4
    assert "AdamW" not in work
    work = count_work(model, [2, 3], training=True)
    assert work["matrix products"].flops == 3 * 3 * 5 * 2 * (4 * 64 + 2 * 128)
    assert work["embeddings"].bytes == 6 * 5 * 8 * 4
    assert work["AdamW"].bytes == 4 * (7 * sum(parameter.numel() for parameter in model.parameters()) - 50 * 8)


def test_time_inside_an_op_is_that_op_s_alone():
    def event(name, microseconds, parent=None):
        elapsed = types.SimpleNamespace(elapsed_us=lambda: microseconds)
        return types.SimpleNamespace(name=name, cpu_parent=parent, time_range=elapsed)

    attention = event("erniem_fast::attention_backward", 50)
    inner = event("aten::matmul", 40, parent=event("aten::bmm", 45, parent=attention))
    linear = event("aten::linear", 10)
    events = [attention, inner, linear, event("aten::addmm", 9, parent=linear), event("aten::add", 7)]
    assert breakdown.by_op(events) == {"attention": 5e-5, "matrix products": 1e-5}


@every_library
def test_products_of_every_library_are_seen(name):
    x, weight = torch.ones(5, 8), torch.ones(4, 8, requires_grad=True)
    with products_by(name), breakdown._labelled_ops(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        linear(x, weight).sum().backward()
        with torch.no_grad():
            linear(x, weight, out=torch.empty(5, 4))
    assert breakdown.by_op(profiler.events())["matrix products"] > 0
    labels = [event.name for event in profiler.events() if event.name == "erniem_fast::matrix products"]
    assert len(labels) == (1 if name == "torch" else 3)


def test_the_breakdown_accounts_for_every_moment(arguments, capsys, monkeypatch):
    monkeypatch.setitem(roofline.MATRIX, "cpu", 64)
    monkeypatch.setattr(breakdown, "SPEC", Spec(4, "text", 4, rounds=1))
    attention = breakdown.ops.attention
    breakdown.run_and_save(arguments, TINY)
    assert breakdown.ops.attention is attention
    run = read(Breakdown, arguments.output / "breakdown-tiny-float32.json")
    named = {"embeddings", "attention", "add_norm", "bias_gelu", "matrix products", "everything else"}
    for name, ops in {"forward": named, "training": named | {"AdamW"}}.items():
        *rows, total = getattr(run, name)
        assert {row.op for row in rows} == ops
        assert min(row.seconds for row in rows) > 0
        assert total.seconds == pytest.approx(sum(row.seconds for row in rows))
        assert total.ratio == pytest.approx(total.seconds / total.floor)
        reached = run.reached[name]
        assert 0 < reached.seconds < 2 * total.seconds
        assert reached.share > 0
    assert (arguments.output / "breakdown-tiny-float32.png").read_bytes().startswith(b"\x89PNG")
    assert "GFLOP/s" in capsys.readouterr().out
