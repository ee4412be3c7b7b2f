"""Whole runs of the benchmark, with peers that are right, wrong, dead or absent."""

import dataclasses
import json
import pathlib
import signal
import types

import psutil
import pytest
from runs import TINY

from bench import ROOT
from bench.model import throughput
from bench.model.rivals import OURS
from bench.model.workers import Peer

DIE = "if turn == 2: sys.exit('out of luck')"
INTERRUPT = "if turn == 2: os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"


def test_two_peers_end_to_end(benchmark, fake, capsys):
    code, run = benchmark(fake("erniem_fast", seconds=0.5), fake("old", seconds=1.25, memory=2**29))
    ours, old = run.jobs[0].peers
    assert code == 0
    assert ours.rounds == [[0.5, 0.5]] * 3
    assert ours.tokens_per_second.median == run.jobs[0].tokens
    assert (old.speedup.median, old.memory_ratio, old.output_difference) == (2.5, 2.0, 0.0)
    assert [peer.load_memory for peer in run.peers] == [2**31, 2**30]
    assert "2.50x (2.50-2.50)" in capsys.readouterr().out
    assert json.dumps(dataclasses.asdict(run)).count(str(pathlib.Path.home())) == 0


def test_a_wrong_output_is_refused_with_its_figure(benchmark, fake):
    code, run = benchmark(fake("erniem_fast"), fake("wrong", value=1.001), fake("old"))
    _, wrong, old = run.jobs[0].peers
    assert code == 1
    assert wrong.output_difference == pytest.approx(1e-3, rel=1e-4)
    assert wrong.problem.startswith("wrong refused: its output differs from that of erniem_fast by 0.001 ")
    assert (wrong.rounds, wrong.speedup) == ([], None)
    assert old.speedup.median == 1.0


def test_an_output_of_nan_is_refused(benchmark, fake):
    _, run = benchmark(fake("erniem_fast"), fake("wrong", value="np.nan"))
    assert "refused: its output differs from that of erniem_fast by nan " in run.jobs[0].peers[1].problem


def test_a_worker_that_dies_is_reported_and_the_run_goes_on(benchmark, fake, capsys):
    options = ("--batch-size", "4", "1", "--lengths", "fixed:3", "--sentences", "8", "--rounds", "4")
    code, run = benchmark(fake("erniem_fast"), fake("mortal", on_turn=DIE), fake("old"), options=options)
    first, second = ({peer.peer: peer for peer in job.peers} for job in run.jobs)
    assert code == 1
    assert [len(first[name].rounds) for name in ("erniem_fast", "mortal", "old")] == [4, 1, 4]
    assert first["mortal"].problem == ("mortal ended with exit code 1 in 'time'; the end of its stderr:\nout of luck")
    assert second["mortal"].problem == "mortal not measured: it died in an earlier job"
    assert [len(second[name].rounds) for name in ("erniem_fast", "mortal", "old")] == [4, 0, 4]
    assert "out of luck" in capsys.readouterr().out


def test_the_run_goes_on_without_ours(benchmark, fake):
    code, run = benchmark(fake("erniem_fast", on_turn=DIE), fake("old"))
    ours, old = run.jobs[0].peers
    assert code == 1
    assert (len(ours.rounds), len(old.rounds)) == (1, 3)


@pytest.fixture
def listen_to_ctrl_c():
    """A shell starts its background jobs with SIGINT ignored, and then Python ignores it too."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("listen_to_ctrl_c")
def test_ctrl_c_keeps_what_was_measured(benchmark, fake, capsys):
    code, run = benchmark(fake("erniem_fast"), fake("old", on_turn=INTERRUPT))
    ours, old = run.jobs[0].peers
    assert code == 130
    assert run.interrupted
    # The first round is whole; in the second, the other had the first turn.
    assert (len(ours.rounds), len(old.rounds)) == (1, 1)
    assert old.speedup.median == 1.0
    assert "**Interrupted**" in capsys.readouterr().out


def test_a_peer_without_its_environment_is_absent_with_the_reason(benchmark, fake):
    absent = Peer("homeless", OURS.command, ROOT / ".venv-nowhere/bin/python")
    code, run = benchmark(fake("erniem_fast"), absent)
    assert code == 0
    reason = "its environment is missing: no .venv-nowhere; `make bench-all` makes it"
    assert run.absent == [f"homeless: {reason}"]
    assert [peer.peer for peer in run.jobs[0].peers] == ["erniem_fast"]


def test_who_finds_no_memory_is_absent_with_the_reason(benchmark, fake, monkeypatch):
    weights = sum(path.stat().st_size for path in TINY.iterdir())
    memory = types.SimpleNamespace(total=2**35, available=2 * (1.3 * weights + 4e8) + 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    code, run = benchmark(fake("erniem_fast"), fake("old"), fake("late"))
    assert code == 0
    assert [peer.peer for peer in run.jobs[0].peers] == ["erniem_fast", "old"]
    (reason,) = run.absent
    assert reason.startswith("late: all peers stay in memory, it needs about 0.4 GB and the others leave 0.0 GB")


def test_training_is_for_those_who_can_and_is_checked_by_what_was_learnt(benchmark, fake):
    options = ("--train", "--batch-size", "4", "--lengths", "fixed:5", "--sentences", "8", "--rounds", "1")
    learner = dataclasses.replace(OURS, name="learner")
    pupil = dataclasses.replace(fake("pupil", value=0.0), trains=True)
    code, run = benchmark(OURS, fake("runtime"), learner, pupil, options=options)
    assert code == 1
    assert run.absent == ["runtime: it cannot train"]
    (job,) = run.jobs
    assert job.name == "4 x fixed:5, training"
    ours, learner, pupil = job.peers
    assert learner.output_difference < 1e-5
    assert min(ours.rounds[0] + learner.rounds[0]) > 0
    assert (pupil.rounds, pupil.problem[:13]) == ([], "pupil refused")


def test_our_real_worker_end_to_end(benchmark, tmp_path):
    code, run = benchmark(
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
