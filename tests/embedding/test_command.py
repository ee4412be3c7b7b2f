"""`python -m erniem_fast embed`: files of vectors, also after stops at any point."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest

import erniem_fast
from erniem_fast.embedding import batches, command, vector_file
from erniem_fast.resumable import ResumableOutput
from tests.embedding.test_rows import write
from tests.golden import cases
from tests.integration.texts import TEXTS

ROWS = [*TEXTS, "", "a", *TEXTS[:3]]
IDS = list(range(100, 100 + len(ROWS)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several windows, and row groups, of few rows."""
    monkeypatch.setattr(batches, "WINDOW_TEXTS", 4)
    monkeypatch.setattr(vector_file, "ROW_GROUP", 5)


@pytest.fixture(scope="module")
def vectors():
    """Of the rows one by one."""
    model = erniem_fast.ErnieMModel.from_pretrained(cases.TINY)
    return np.concatenate([erniem_fast.embed(model, [text]) for text in ROWS])


def parse(*options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--model", str(cases.TINY), *map(str, options)])


def embed(*options):
    return command.run(parse(*options))


def read(path):
    if path.suffix == ".npy":
        return np.load(path)
    flat = pq.read_table(path)["embedding"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(ROWS), -1)


@pytest.mark.parametrize("output", ["out.npy", "out.parquet"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_vectors_are_written_in_the_order_of_rows(tmp_path, vectors, output, suffix):
    source = write(tmp_path / f"in{suffix}", ROWS)
    assert embed("--input", source, "--output", tmp_path / output) == 0
    np.testing.assert_allclose(read(tmp_path / output), vectors, rtol=0, atol=1e-6)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([source.name, output])


def test_ids_are_written_beside_vectors(tmp_path, vectors):
    source = write(tmp_path / "in.jsonl", ROWS, IDS)
    assert embed("--input", source, "--output", tmp_path / "out.parquet", "--id", "key") == 0
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == IDS
    np.testing.assert_allclose(read(tmp_path / "out.parquet"), vectors, rtol=0, atol=1e-6)


def test_options_reach_the_model(tmp_path):
    source = write(tmp_path / "in.txt", ROWS)
    options = ("--pooling", "cls", "--no-normalize", "--prompt", "query: ", "--max-length", 9, "--weights", "int8")
    assert embed("--input", source, "--output", tmp_path / "out.npy", *options) == 0
    model = erniem_fast.optimize(erniem_fast.ErnieMModel.from_pretrained(cases.TINY), weights="int8")
    expected = erniem_fast.embed(model, ROWS, pooling="cls", normalize=False, prompt="query: ", max_length=9)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=1e-5)


def test_a_sentence_transformer_is_found(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    words = pytest.importorskip("sentence_transformers.base.modules").Transformer(str(cases.TINY))
    encoder = sentence_transformers.SentenceTransformer(
        modules=[words, modules.Pooling(cases.HIDDEN, "cls")], device="cpu"
    )
    encoder.save(str(tmp_path / "model"))
    source = write(tmp_path / "in.txt", ROWS)
    assert embed("--input", source, "--output", tmp_path / "out.npy", "--model", tmp_path / "model") == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode(ROWS), rtol=0, atol=1e-5)


def test_no_rows(tmp_path):
    (tmp_path / "in.txt").write_text("")
    for output in ("out.npy", "out.parquet"):
        assert embed("--input", tmp_path / "in.txt", "--output", tmp_path / output) == 0
    assert np.load(tmp_path / "out.npy").shape == (0, cases.HIDDEN)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


class Stop(KeyboardInterrupt):
    pass


POINTS = {
    "before a window is written": (ResumableOutput, "append"),
    "before the state is written": (ResumableOutput, "_write_state"),
    "before the output is written": (ResumableOutput, "finish"),
    "before the output appears": (vector_file, "_write_parquet"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, capsys, point):
    source = write(tmp_path / "in.jsonl", ROWS, IDS)
    options = ("--input", source, "--id", "key", "--output")
    assert embed(*options, tmp_path / "whole.parquet") == 0
    place, name = POINTS[point]
    original, stops = getattr(place, name), 0
    for last in range(1, 9):
        calls = 0

        def stop(*arguments, last=last, **named):
            nonlocal calls
            calls += 1
            if calls == last:
                if name == "_write_parquet":
                    original(*arguments, **named)
                raise Stop
            return original(*arguments, **named)

        monkeypatch.setattr(place, name, stop)
        code = embed(*options, tmp_path / "out.parquet")
        assert code in (0, 130)
        if code == 0:
            break
        stops += 1
        assert "start the same command again to go on" in capsys.readouterr().err
        assert not (tmp_path / "out.parquet").exists()
    monkeypatch.setattr(place, name, original)
    assert stops >= (1 if place is vector_file or name == "finish" else 3)
    assert code == 0 or embed(*options, tmp_path / "out.parquet") == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "out.parquet.partial").exists()


def test_nothing_is_computed_twice_except_a_window(tmp_path, monkeypatch):
    source = write(tmp_path / "in.txt", ROWS)
    monkeypatch.setattr(ResumableOutput, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert embed("--input", source, "--output", tmp_path / "out.npy") == 130
    monkeypatch.undo()
    monkeypatch.setattr(batches, "by_tokens", None)  # what computes cannot run
    assert embed("--input", source, "--output", tmp_path / "out.npy") == 0
    assert np.load(tmp_path / "out.npy").shape == (len(ROWS), cases.HIDDEN)


def test_a_process_that_is_killed(tmp_path):
    source = write(tmp_path / "in.txt", [f"a {index}" for index in range(6000)])
    command_line = [sys.executable, "-m", "erniem_fast", "embed", "--model", str(cases.TINY), "--input", str(source)]
    state = tmp_path / "out.npy.partial/state.json"

    def begin(output):
        return subprocess.Popen(
            [*command_line, "--output", str(tmp_path / output)], stderr=subprocess.PIPE, preexec_fn=restore_interrupts
        )

    done = 0
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        running = begin("out.npy")
        while running.poll() is None and not (state.exists() and json.loads(state.read_text())["rows"] > done):
            time.sleep(0.005)
        running.send_signal(how)
        _, error = running.communicate()
        assert running.returncode == code, error.decode()
        before, done = done, json.loads(state.read_text())["rows"]
        assert before < done < 6000
        assert not (tmp_path / "out.npy").exists()
    for output in ("out.npy", "whole.npy"):
        _, error = (running := begin(output)).communicate()
        assert running.returncode == 0, error.decode()
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def restore_interrupts():
    """Shells let processes in the background ignore interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after some windows; its options."""
    source = write(tmp_path / "in.jsonl", ROWS, IDS)
    options = ["--input", source, "--output", tmp_path / "out.parquet"]
    with monkeypatch.context() as patched:
        patched.setattr(ResumableOutput, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert embed(*options) == 130
    return options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pooling", "max"], "pooling was None and is 'max'"),
        (["--weights", "int8"], "weights was None and is 'int8'"),
        (["--id", "key"], "id was None and is 'key'"),
    ],
)
def test_a_run_goes_on_only_with_the_same_options(stopped, capsys, options, message):
    assert embed(*stopped, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Start it as before to go on, or remove the folder to begin anew" in error


def test_a_run_goes_on_only_with_the_same_input(stopped, capsys):
    os.utime(stopped[1])
    with stopped[1].open("a") as file:
        file.write('{"text": "more", "key": 1}\n')
    assert embed(*stopped) == 2
    assert "input was " in capsys.readouterr().err


def test_a_run_goes_on_only_with_the_same_model(stopped, capsys, tmp_path):
    model = erniem_fast.ErnieMModel.from_pretrained(cases.TINY)
    model.pooler.dense.bias.data += 1
    model.save_pretrained(tmp_path / "model")
    erniem_fast.ErnieMTokenizer.from_pretrained(cases.TINY).save_pretrained(tmp_path / "model")
    assert embed(*stopped, "--model", tmp_path / "model") == 2
    assert "model was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.csv"], "--output out.csv must end in .parquet or .npy"),
        (["--output", "missing/out.npy"], "there is no folder missing; make it first"),
        (["--output", "there.npy"], "there.npy is there already; remove it, or name another file"),
        (["--output", "out.npy", "--id", "key"], "--id key: only .parquet holds ids"),
        (["--output", "out.npy", "--column", "other"], "line 1: it has no 'other'"),
        (["--output", "out.npy", "--max-length", 9999], "max_length=9999 must be an integer in"),
        (["--output", "out.npy", "--prompt-name", "x"], "prompt_name='x' is for a SentenceTransformer"),
        (["--output", "out.npy", "--input", "none.txt"], "--input none.txt: there is no such file"),
        (["--output", "out.npy", "--model", "nowhere"], "There is no folder 'nowhere', and no such model on the hub"),
        (["--output", "out.npy", "--device", "nowhere"], "device='nowhere' cannot be used: "),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "there.npy").touch()
    write(tmp_path / "in.jsonl", ROWS, IDS)
    assert embed("--input", "in.jsonl", *options) == 2
    assert message in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "there.npy"]
