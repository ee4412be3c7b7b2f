"""The rest of the benchmark: the rivals' weights, the breakdown, all parts in one command, and the README's table."""

import dataclasses
import itertools
import json
import pathlib
import types

import pytest
import torch
import torch.nn.functional as F

from bench import ROOT, roofline
from bench.machine import Machine
from bench.model import breakdown, everything, rivals
from bench.model.figures import Breakdown, JobFigures, LoadedPeer, ModelRun, PeerFigures
from bench.model.jobs import Spec, pad
from bench.model.work import count_work
from bench.peers import exports, packed, xlm_roberta
from bench.record import Settings, read
from bench.report import readme
from bench.report.bars import plot_panels
from bench.report.curves import plot_curves
from bench.report.model import losses, overview
from bench.roofline import Rates, Work
from bench.timing import Quartiles
from erniem_fast import ErnieMConfig, ErnieMModel

TINY = ROOT / "tests/golden/tiny"
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


def test_an_export_that_fails_leaves_nothing_to_be_taken_for_one(tmp_path):
    with pytest.raises(SystemExit, match="the checkpoint could not be exported as nonsense"):
        exports.exported("nonsense", "model", tmp_path)
    assert not (tmp_path / "nonsense").exists()


def test_an_ablation_switches_off_each_kernel_that_runs_here(monkeypatch):
    chosen = {"embeddings": "native", "attention": "triton", "bias_gelu": "torch", "layernorm": "reference"}
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


def test_the_work_of_an_op_is_counted_by_hand():
    config = ErnieMConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    model = ErnieMModel(config)
    work = count_work(model, [2, 3], training=False)
    # Five tokens and 13 pairs; four products of 8 x 8 and two of 8 x 16, two operations for each weight.
    assert work["matrix products"].flops == 3 * 5 * 2 * (4 * 64 + 2 * 128)
    assert work["attention"].flops == 3 * 13 * 2 * 2 * 8
    assert work["bias_gelu_dropout"].bytes == 3 * 2 * 5 * 16 * 4
    assert work["add_layernorm"].bytes == 3 * 2 * 3 * 5 * 8 * 4
    assert "AdamW" not in work
    work = count_work(model, [2, 3], training=True)
    assert work["matrix products"].flops == 3 * 3 * 5 * 2 * (4 * 64 + 2 * 128)
    assert work["embeddings"].bytes == 6 * 5 * 8 * 4
    assert work["AdamW"].bytes == 4 * (7 * sum(parameter.numel() for parameter in model.parameters()) - 50 * 8)


def test_a_floor_is_the_longer_of_computing_and_copying():
    rates = Rates(flops_per_second=10.0, bytes_per_second=2.0)
    assert Work(flops=50.0, bytes=4.0).floor(rates) == 5.0
    assert Work(flops=50.0, bytes=14.0).floor(rates) == 7.0


def test_time_inside_an_op_is_that_op_s_alone():
    def event(name, microseconds, parent=None):
        elapsed = types.SimpleNamespace(elapsed_us=lambda: microseconds)
        return types.SimpleNamespace(name=name, cpu_parent=parent, time_range=elapsed)

    attention = event("erniem_fast::attention_backward", 50)
    inner = event("aten::matmul", 40, parent=event("aten::bmm", 45, parent=attention))
    linear = event("aten::linear", 10)
    events = [attention, inner, linear, event("aten::addmm", 9, parent=linear), event("aten::add", 7)]
    assert breakdown.by_op(events) == {"attention": 5e-5, "matrix products": 1e-5}


@pytest.fixture
def arguments(tmp_path):
    return types.SimpleNamespace(
        model=TINY, size="base", dtype="float32", device="cpu", threads=1, output=tmp_path / "results", long=False
    )


def test_the_breakdown_accounts_for_every_moment(arguments, capsys, monkeypatch):
    monkeypatch.setitem(roofline.MATRIX, "cpu", 64)
    monkeypatch.setattr(breakdown, "SPEC", Spec(4, "text", 4, rounds=1))
    attention = breakdown.ops.attention
    breakdown.run_and_save(arguments, TINY)
    assert breakdown.ops.attention is attention
    run = read(Breakdown, arguments.output / "breakdown-tiny-float32.json")
    named = {"embeddings", "attention", "add_layernorm", "bias_gelu_dropout", "matrix products", "everything else"}
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


@pytest.fixture
def parts(monkeypatch):
    """Two parts that note who ran, instead of measuring."""
    ran, codes = [], {}
    monkeypatch.setattr(everything, "PARTS", tuple((name, "original", everything.INFERENCE) for name in ("a", "b")))
    monkeypatch.setattr(everything, "run_and_save", lambda name, *_: ran.append(name) or codes.get(name, 0))
    monkeypatch.setattr(everything.breakdown, "run_and_save", lambda *_: ran.append("breakdown"))
    return ran, codes


def test_all_parts_run_and_the_worst_is_told(arguments, parts):
    ran, codes = parts
    codes["a"] = 1
    assert everything.run_parts(arguments, TINY) == 1
    assert ran == ["a", "b", "breakdown"]


def test_ctrl_c_ends_the_parts_that_are_left(arguments, parts):
    ran, codes = parts
    codes["a"] = 130
    assert everything.run_parts(arguments, TINY) == 130
    assert ran == ["a"]


def test_a_long_run_adds_batches_of_128():
    assert everything.lengthen(everything.INFERENCE)[-1] == Spec(128, "text", rows=128, rounds=7)
    assert {spec.rounds for spec in everything.lengthen(everything.INFERENCE)} == {7}
    (training,) = everything.lengthen(everything.TRAINING)
    assert training == Spec(32, "text", rows=64, rounds=7, train=True)


def run_of(*jobs):
    """A run of the base model, as read from its file."""
    peers = [
        LoadedPeer("erniem_fast", {"python": "3.11", "transformers": "5"}, 1.0, 0.5),
        LoadedPeer("old", {"openvino": "1"}, 1.0, 0.5),
    ]
    return ModelRun(
        name="rivals",
        date="2026-11-23T10:00:00+00:00",
        machine=Machine("A CPU", 2, "AVX2", 24, None, "Linux"),
        settings=Settings("base, random weights", "float32", "cpu", 2),
        peers=peers,
        absent=[],
        interrupted=False,
        jobs=list(jobs),
    )


def job(name, **ratios):
    """A job of erniem_fast and others that are slower by these ratios; None for one that was not measured."""
    peers = [
        peer("erniem_fast", None),
        *(peer(name, ratio, measured=ratio is not None) for name, ratio in ratios.items()),
    ]
    size, _, lengths = name.partition(" x ")
    return JobFigures(name, int(size), lengths, False, 1, int(size), 900, 2000, 0.45, peers)


def peer(name, ratio, measured=True):
    rate = Quartiles(900.0, 1000.0, 1100.0) if measured else None
    return PeerFigures(
        peer=name,
        tokens_per_second=rate,
        rows_per_second=None,
        batch_seconds=None,
        speedup=ratio and Quartiles(ratio, ratio, ratio),
        peak_memory=None,
        memory_ratio=None,
        output_difference=None,
        problem=None,
        rounds=[[1.0]] if measured else [],
    )


def test_overview_has_a_row_for_every_peer_and_a_dash_for_what_was_not_measured():
    jobs = [job("32 x text", old=2.123, dead=None), job("1 x text", new=0.9)]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in overview(jobs).splitlines()[2:]] == [
        ["erniem_fast", "1,000 tokens/s", "1,000 tokens/s"],
        ["old", "2.12x", "-"],
        ["dead", "-", "-"],
        ["new", "-", "0.90x"],
    ]
    assert losses(jobs) == ["**erniem_fast is slower** in 1 x text against new (0.90x)."]


def test_pictures_leave_out_what_was_not_measured(tmp_path):
    run = run_of(*(job(name, old=2.0, dead=None) for name in ("32 x text", "1 x text", "32 x fixed:9")))
    for draw in (plot_panels, plot_curves):
        draw(run, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()


def test_the_readme_is_rewritten_between_its_markers(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text(text, encoding="utf-8")
    for name, jobs in ((readme.RIVALS, [job("32 x text", old=2.5)]), (readme.TRAINING, [job("4 x fixed:9", old=0.8)])):
        (tmp_path / name).write_text(json.dumps(dataclasses.asdict(run_of(*jobs))))
    readme.main([str(tmp_path)])
    new = readme.README.read_text(encoding="utf-8")
    before, rest = new.split(readme.BEGIN)
    section, after = rest.split(readme.END)
    assert (before, after) == (text.split(readme.BEGIN)[0], text.split(readme.END)[1])
    assert "| old         | 2.50x               | 0.80x                 |" in section
    assert "openvino 1, python 3.11; 2026-11-23" in section
    assert "**erniem_fast is slower** in 4 x fixed:9 against old (0.80x)." in section
    assert str(tmp_path) not in section


def test_a_readme_without_results_is_left_alone(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no rivals-base-float32\.json and no training-base-float32\.json"):
        readme.main([str(tmp_path)])
