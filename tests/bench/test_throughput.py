"""The benchmark: its statistics, its jobs, and what it does with peers that are wrong, dead or absent."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import types

import numpy as np
import psutil
import pytest
import torch

from bench import ROOT
from bench.difference import difference
from bench.machine import Machine
from bench.model import throughput
from bench.model.figures import Latency, LoadedPeer, ModelRun
from bench.model.jobs import Job, Spec, make_jobs, pad
from bench.model.measure import Measurement
from bench.model.rivals import OURS, OURS_INT8
from bench.model.summary import summarise
from bench.model.text import text_encoder
from bench.model.workers import Peer, Worker, WorkerError
from bench.record import Settings, read
from bench.report.model import markdown
from bench.timing import Quartiles, quartiles

TINY = ROOT / "tests/golden/tiny"
OURS_NAMES = (OURS.name, OURS_INT8.name)

# A worker with no model in it: every hidden state is VALUE and every batch takes SECONDS, whatever the clock says.
FAKE = """
import json, os, signal, sys, time
import numpy as np
turn = 0
for line in sys.stdin:
    request = json.loads(line)
    reply = {}
    if request["op"] == "export":
        reply = {"seconds": 0}
    if request["op"] == "load":
        reply = {"versions": {"python": "3"}}
    if request["op"] == "check":
        batches = request["batches"]
        reply = {"first_seconds": 0.25}
        np.save(request["output"], np.full((sum(np.sum(b["attention_mask"]) for b in batches), 1), VALUE, np.float32))
    if request["op"] == "time":
        turn += 1
        ON_TURN
        reply = {"seconds": [SECONDS] * len(batches), "peak_memory": MEMORY}
    print(json.dumps(reply), flush=True)
"""
DIE = "if turn == 2: sys.exit('out of luck')"
INTERRUPT = "if turn == 2: os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"


@pytest.fixture
def fake(tmp_path):
    def make(name, value=1.0, seconds=0.5, memory=2**30, on_turn="pass"):
        text = FAKE
        for word, replacement in {"VALUE": value, "SECONDS": seconds, "MEMORY": memory, "ON_TURN": on_turn}.items():
            text = text.replace(word, str(replacement))
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        return Peer(name, (str(script),), pathlib.Path(sys.executable))

    return make


@pytest.fixture
def bench(tmp_path):
    """Runs the benchmark on the tiny checkpoint with given peers; returns its exit code and its JSON."""

    def run(*peers, options=("--batch-size", "4", "--lengths", "text", "--sentences", "8", "--rounds", "3")):
        output = tmp_path / "results"
        code = throughput.main([*options, "--model", str(TINY), "--threads", "1", "--output", str(output)], peers)
        path = output / f"{'training' if '--train' in options else 'throughput'}-tiny-float32.json"
        return code, read(ModelRun, path) if path.exists() else None

    return run


def measured(peer, rounds, peak_memory=100, int8=False):
    """A measurement of a job of 30 real tokens in two batches."""
    job = Job(Spec(2, "text", 4, len(rounds)), [pad([[5] * 10, [5] * 5]), pad([[5] * 7, [5] * 8])])
    return Measurement(job, peer, int8, rounds=rounds, peak_memory=peak_memory)


def test_quartiles_interpolate_as_numpy_does():
    assert quartiles([4.0, 1.0, 2.0, 3.0]) == Quartiles(1.75, 2.5, 3.25)


def test_ratio_is_paired_round_by_round():
    # The machine slows down tenfold in the second round; a ratio of medians would see 1.1 instead of 2.
    ours = measured("erniem_fast", [[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]])
    theirs = measured("old", [[2.0, 2.0], [20.0, 20.0], [1.0, 3.0]], peak_memory=80)
    (job,) = summarise([ours, theirs], OURS_NAMES)
    assert (job.tokens, job.positions, job.fill) == (30, 36, 30 / 36)
    assert job.peers[0].tokens_per_second == Quartiles(8.25, 15.0, 15.0)
    assert job.peers[0].speedup is None
    assert job.peers[1].speedup == Quartiles(2.0, 2.0, 2.0)
    assert job.peers[1].memory_ratio == 1.25


def test_ratio_uses_the_rounds_that_both_have():
    (job,) = summarise([measured("erniem_fast", [[1.0], [1.0]]), measured("old", [[3.0]])], OURS_NAMES)
    assert job.peers[1].speedup.median == 3.0


def test_8_bits_are_compared_with_8_bits():
    names = {"erniem_fast": 4.0, "old": 6.0, "erniem_fast int8": 2.0, "old int8": 1.0}
    measurements = [measured(name, [[seconds]], int8="int8" in name) for name, seconds in names.items()]
    ratios = [peer.speedup and peer.speedup.median for peer in summarise(measurements, OURS_NAMES)[0].peers]
    assert ratios == [None, 1.5, None, 0.5]
    (job,) = summarise(measurements[:2] + measurements[3:], OURS_NAMES)
    assert job.peers[2].speedup.median == 0.25


def test_table_shows_rates_ratios_and_losses():
    measurements = [measured("erniem_fast", [[1.0, 1.0]] * 3, 2**30), measured("old", [[0.75, 0.75]] * 3, 2**31)]
    text = markdown(fake_run(summarise(measurements, OURS_NAMES)))
    assert "Medians and quartiles of 3 rounds of up to 4 rows" in text
    assert "| 2 x text, 83% full | erniem_fast | 15 (15-15) " in text
    assert (
        "| old         | 20 (20-20)                | 2.7    | 750 (750)                   | 0.75x (0.75-0.75)" in text
    )
    assert "| 2,048 MiB   | 0.50x " in text
    assert "**erniem_fast is slower** in 2 x text against old (0.75x)." in text


def test_a_ratio_that_rounds_to_one_is_no_loss():
    measurements = [measured("erniem_fast", [[1.004]] * 3), measured("old", [[1.0]] * 3)]
    assert "slower" not in markdown(fake_run(summarise(measurements, OURS_NAMES)))


def test_a_batch_s_time_is_that_of_all_rounds():
    (job,) = summarise([measured("erniem_fast", [[0.1, 0.2], [0.3, 0.9]])], OURS_NAMES)
    assert job.peers[0].batch_seconds == Latency(0.25, pytest.approx(0.882))
    # Four rows, in 0.3 and in 1.2 seconds.
    assert job.peers[0].rows_per_second == pytest.approx((4 / 0.3 + 4 / 1.2) / 2)


def test_a_busy_machine_is_told():
    steady, unsteady = measured("erniem_fast", [[1.0], [1.0], [1.1]]), measured("old", [[1.0], [1.0], [1.4]])
    text = markdown(fake_run(summarise([steady, unsteady], OURS_NAMES)))
    assert "**Unsteady**: the quartiles lie more than 10% of the median apart in 2 x text of old." in text


def fake_run(jobs):
    return ModelRun(
        name="throughput",
        date="2026-11-23T10:00:00+00:00",
        machine=Machine("A CPU", 2, "AVX2", 24, None, "Linux"),
        settings=Settings("base", "float32", "cpu", 2),
        peers=[LoadedPeer("old", {"python": "3"}, 1.0, 0.5)],
        absent=[],
        interrupted=False,
        jobs=jobs,
    )


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


def test_difference_is_relative_to_the_root_mean_square():
    reference = torch.tensor([[3.0, -4.0]])
    assert difference(torch.tensor([[3.0, -3.0]]), reference) == pytest.approx(1 / np.sqrt(12.5))
    assert difference(reference[:, :1], reference) == float("inf")


def test_two_peers_end_to_end(bench, fake, capsys):
    code, run = bench(fake("erniem_fast", seconds=0.5), fake("old", seconds=1.25, memory=2**29))
    ours, old = run.jobs[0].peers
    assert code == 0
    assert ours.rounds == [[0.5, 0.5]] * 3
    assert ours.tokens_per_second.median == run.jobs[0].tokens
    assert (old.speedup.median, old.memory_ratio, old.output_difference) == (2.5, 2.0, 0.0)
    assert "2.50x (2.50-2.50)" in capsys.readouterr().out
    assert json.dumps(dataclasses.asdict(run)).count(str(pathlib.Path.home())) == 0


def test_a_wrong_output_is_refused_with_its_figure(bench, fake):
    code, run = bench(fake("erniem_fast"), fake("wrong", value=1.001), fake("old"))
    _, wrong, old = run.jobs[0].peers
    assert code == 1
    assert wrong.output_difference == pytest.approx(1e-3, rel=1e-4)
    assert wrong.problem.startswith("wrong refused: its output differs from that of erniem_fast by 0.001 ")
    assert (wrong.rounds, wrong.speedup) == ([], None)
    assert old.speedup.median == 1.0


def test_an_output_of_nan_is_refused(bench, fake):
    _, run = bench(fake("erniem_fast"), fake("wrong", value="np.nan"))
    assert "refused: its output differs from that of erniem_fast by nan " in run.jobs[0].peers[1].problem


def test_a_worker_that_dies_is_reported_and_the_run_goes_on(bench, fake, capsys):
    options = ("--batch-size", "4", "1", "--lengths", "fixed:3", "--sentences", "8", "--rounds", "4")
    code, run = bench(fake("erniem_fast"), fake("mortal", on_turn=DIE), fake("old"), options=options)
    first, second = ({peer.peer: peer for peer in job.peers} for job in run.jobs)
    assert code == 1
    assert [len(first[name].rounds) for name in ("erniem_fast", "mortal", "old")] == [4, 1, 4]
    assert first["mortal"].problem == ("mortal ended with exit code 1 in 'time'; the end of its stderr:\nout of luck")
    assert second["mortal"].problem == "mortal not measured: it died in an earlier job"
    assert [len(second[name].rounds) for name in ("erniem_fast", "mortal", "old")] == [4, 0, 4]
    assert "out of luck" in capsys.readouterr().out


def test_the_run_goes_on_without_ours(bench, fake):
    code, run = bench(fake("erniem_fast", on_turn=DIE), fake("old"))
    ours, old = run.jobs[0].peers
    assert code == 1
    assert (len(ours.rounds), len(old.rounds)) == (1, 3)


def test_a_worker_that_was_killed_between_two_requests_is_told_from_one_that_failed(fake):
    worker = Worker(fake("mortal"), "model", "exports")
    worker.process.kill()
    worker.process.wait()
    assert worker.dead
    with pytest.raises(WorkerError, match=r"was killed by signal 9 in 'time'; the end of its stderr:\n\(nothing\)"):
        worker.request("time")
    worker.close()


SERVED = """
import numpy as np
from bench.peers.serve import Peer, serve
class Talkative(Peer):
    def load(self, model, device, dtype, threads):
        np.ones(2**25).sum()  # 256 MiB, freed at once
        return {"model": model, "device": device, "dtype": dtype, "threads": threads}
    def prepare(self, input_ids, attention_mask):
        return np.array(input_ids)
    def forward(self, inputs):
        print("a library that prints")
        return np.stack([inputs, -inputs], axis=-1)
serve(Talkative())
"""


def test_the_server_saves_real_tokens_only_and_forgets_the_memory_of_loading(tmp_path):
    script = tmp_path / "talkative.py"
    script.write_text(SERVED)
    settings = {"device": "cpu", "dtype": "float32", "threads": 3}
    peer = Peer("talkative", (str(script),), pathlib.Path(sys.executable))
    with contextlib.closing(Worker(peer, "m", "e", **settings)) as worker:
        assert {name: worker.versions[name] for name in settings} == settings
        assert worker.versions["model"] == "m"
        output = tmp_path / "output.npy"
        worker.request("check", batches=[pad([[5, 6, 7], [8]]), pad([[9]])], train=False, output=str(output))
        assert np.load(output).tolist() == [[5, -5], [6, -6], [7, -7], [8, -8], [9, -9]]
        reply = worker.request("time")
    assert len(reply["seconds"]) == 2
    assert min(reply["seconds"]) > 0
    # Python and NumPy take 30 MiB; only Linux forgets a peak.
    assert reply["peak_memory"] < (150 if sys.platform == "linux" else 1000) * 2**20


def test_ctrl_c_in_a_terminal_does_not_reach_the_workers(fake):
    with contextlib.closing(Worker(fake("old"), "model", "exports")) as worker:
        assert os.getsid(worker.process.pid) == worker.process.pid != os.getsid(0)


@pytest.fixture
def listen_to_ctrl_c():
    """A shell starts its background jobs with SIGINT ignored, and then Python ignores it too."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("listen_to_ctrl_c")
def test_ctrl_c_keeps_what_was_measured(bench, fake, capsys):
    code, run = bench(fake("erniem_fast"), fake("old", on_turn=INTERRUPT))
    ours, old = run.jobs[0].peers
    assert code == 130
    assert run.interrupted
    # The first round is whole; in the second, the other had the first turn.
    assert (len(ours.rounds), len(old.rounds)) == (1, 1)
    assert old.speedup.median == 1.0
    assert "**Interrupted**" in capsys.readouterr().out


def test_a_peer_without_its_environment_is_absent_with_the_reason(bench, fake):
    absent = Peer("homeless", OURS.command, ROOT / ".venv-nowhere/bin/python")
    code, run = bench(fake("erniem_fast"), absent)
    assert code == 0
    reason = "its environment is missing: no .venv-nowhere; `make bench-all` makes it"
    assert run.absent == [f"homeless: {reason}"]
    assert [peer.peer for peer in run.jobs[0].peers] == ["erniem_fast"]


def test_who_finds_no_memory_is_absent_with_the_reason(bench, fake, monkeypatch):
    weights = sum(path.stat().st_size for path in TINY.iterdir())
    memory = types.SimpleNamespace(total=2**35, available=2 * (1.3 * weights + 4e8) + 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    code, run = bench(fake("erniem_fast"), fake("old"), fake("late"))
    assert code == 0
    assert [peer.peer for peer in run.jobs[0].peers] == ["erniem_fast", "old"]
    (reason,) = run.absent
    assert reason.startswith("late: all peers stay in memory, it needs about 0.4 GB and the others leave 0.0 GB")


def test_training_is_for_those_who_can_and_is_checked_by_what_was_learnt(bench, fake):
    options = ("--train", "--batch-size", "4", "--lengths", "fixed:5", "--sentences", "8", "--rounds", "1")
    learner = dataclasses.replace(OURS, name="learner")
    pupil = dataclasses.replace(fake("pupil", value=0.0), trains=True)
    code, run = bench(OURS, fake("runtime"), learner, pupil, options=options)
    assert code == 1
    assert run.absent == ["runtime: it cannot train"]
    (job,) = run.jobs
    assert job.name == "4 x fixed:5, training"
    ours, learner, pupil = job.peers
    assert learner.output_difference < 1e-5
    assert min(ours.rounds[0] + learner.rounds[0]) > 0
    assert (pupil.rounds, pupil.problem[:13]) == ([], "pupil refused")


def test_our_real_worker_end_to_end(bench, tmp_path):
    code, run = bench(
        OURS, options=("--batch-size", "4", "1", "--lengths", "text", "--sentences", "8", "--rounds", "2")
    )
    assert code == 0
    for job in run.jobs:
        (ours,) = job.peers
        assert [len(seconds) for seconds in ours.rounds] == [job.batches] * 2
        assert min(min(seconds) for seconds in ours.rounds) > 0
        assert 50 * 2**20 < ours.peak_memory < 4 * 2**30
    assert run.jobs[0].tokens == run.jobs[1].tokens
    assert run.jobs[0].fill < 1 == run.jobs[1].fill
    assert (tmp_path / "results/throughput-tiny-float32.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number of 1 or more"),
        (
            ["--lengths", "long"],
            "argument --lengths: 'long' is none of text, sorted, modernbert and fixed:N with N of 1 or more",
        ),
        (["--lengths", "fixed:0"], "'fixed:0' is none of text, sorted, modernbert and fixed:N"),
        (["--lengths", "fixed:513"], "--lengths fixed:513: the model takes 512 tokens at most; choose fixed:512"),
        (["--device", "tpu9"], "argument --device: 'tpu9' is none of cpu, cuda and cuda:N"),
        (["--device", "meta"], "argument --device: 'meta' is none of cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "CUDA devices here, so no 'cuda:99'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--model", str(ROOT / "bench")], "holds no config.json; name the folder of an ERNIE-M checkpoint"),
    ],
)
def test_bad_options_get_clear_errors(options, message, tmp_path, capsys):
    base = [] if "--model" in options else ["--model", str(TINY)]
    with pytest.raises(SystemExit) as error:
        throughput.main([*base, "--output", str(tmp_path), *options], peers=[])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_another_architecture_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit):
        throughput.main(["--model", str(tmp_path)], peers=[])
    assert "holds a 'bert' model; name the folder of an 'ernie_m' one" in capsys.readouterr().err
