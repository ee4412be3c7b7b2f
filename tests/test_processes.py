"""What is logged once in a process about missing kernels, and models in processes that were forked."""

import logging
import multiprocessing

import pytest
import torch

import erniem_fast
from erniem_fast import processes
from erniem_fast.native import library
from tests.model.tiny import load

CPU = torch.device("cpu")
IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has not run a model."""
    monkeypatch.setattr(processes, "_settled", set())
    for name in ("RANK", "LOCAL_RANK", "ERNIEM_FAST_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.path.cache_clear()
    yield
    library.path.cache_clear()


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == processes.__name__]


def test_missing_kernels_are_named_once(unbuilt, caplog):
    model = load()
    for _ in range(3):
        model(IDS)
    (line,) = lines(caplog)
    assert line == (
        "PyTorch runs embeddings, attention, bias_gelu, add_norm, slower than kernels of erniem_fast would on cpu: "
        f"{library.NOT_BUILT}"
    )
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_flag_chose_so(unbuilt, caplog, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_KERNELS", "off")
    load()(IDS)
    assert lines(caplog) == []
    monkeypatch.delenv("ERNIEM_FAST_KERNELS")
    with erniem_fast.use_kernels(attention="torch", layernorm="torch"):
        processes.model_runs(CPU)
    assert lines(caplog)[0].startswith("PyTorch runs embeddings, bias_gelu, slower")


def test_verify_leaves_the_line_to_the_next_call(unbuilt, caplog):
    model = load()
    assert erniem_fast.verify(model)
    assert lines(caplog) == []
    model(IDS)
    assert len(lines(caplog)) == 1


def test_kernels_that_run_need_no_line(caplog):
    if not library.is_built("cpu"):
        pytest.skip("no compiler")
    load()(IDS)
    assert lines(caplog) == []
    assert processes._settled == {"cpu"}


@pytest.mark.parametrize(("name", "rank", "count"), [("Process-1", "0", 1), ("Process-12", "0", 0), ("main", "3", 0)])
def test_one_process_speaks_for_all(unbuilt, caplog, monkeypatch, name, rank, count):
    monkeypatch.setenv("LOCAL_RANK", rank)
    if name != "main":
        monkeypatch.setattr(multiprocessing, "parent_process", object)
        monkeypatch.setattr(multiprocessing.current_process(), "_name", name)
    processes.model_runs(CPU)
    assert len(lines(caplog)) == count


# --- Forks -----------------------------------------------------------------------------------------------------------


def in_fork(function):
    """What a function returns in a forked process, within a minute; None if it does not return."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function()), daemon=True)
    process.start()
    result = receiver.recv() if receiver.poll(60) else None
    process.kill()
    process.join()
    return result


@pytest.fixture
def threads():
    """Several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def test_a_forked_process_computes_after_its_parent_has(threads):
    """GNU's OpenMP would wait forever for threads that the child does not have."""
    model, ids = load(), torch.randint(5, 40, (64, 60))

    def states():
        with torch.inference_mode():
            return model(ids).last_hidden_state.numpy()

    expected = states()
    found = in_fork(states)
    assert found is not None
    assert abs(found - expected).max() < 1e-5


def test_only_a_process_whose_parent_has_computed_gives_up_its_threads(threads, monkeypatch):
    monkeypatch.setattr(processes, "_has_gnu_openmp", lambda: True)
    for computes, count in ((False, threads), (True, 1)):
        monkeypatch.setattr(processes._State, "computes", computes)
        assert in_fork(torch.get_num_threads) == count
    monkeypatch.setattr(processes, "_has_gnu_openmp", lambda: False)
    assert in_fork(torch.get_num_threads) == threads


def test_a_forked_process_says_so_once(threads, monkeypatch):
    monkeypatch.setattr(processes, "_has_gnu_openmp", lambda: True)
    monkeypatch.setattr(processes._State, "computes", True)

    def logged():
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        processes._LOG.addHandler(handler)
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
        for _ in range(2):
            processes.model_runs(CPU)
        return [record for record in records if "forked" in record]

    (line,) = in_fork(logged)
    assert f"on {threads} threads" in line
    assert "`spawn`" in line
