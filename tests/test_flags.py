"""Flags: what the environment may say, and what `use_kernels` says over it."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from erniem_fast import flags, ops, use_kernels
from erniem_fast.flags import use_implementations

ATTENTION = flags.OPS["attention"]
LAYERNORM = flags.OPS["add_norm"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in flags.FLAGS:
        monkeypatch.delenv(name, raising=False)


def test_names_and_defaults():
    assert {name: flags.read(flag) for name, flag in flags.FLAGS.items()} == {
        "ERNIEM_FAST_KERNELS": "auto",
        "ERNIEM_FAST_EMBEDDINGS": "auto",
        "ERNIEM_FAST_ATTENTION": "auto",
        "ERNIEM_FAST_BIAS_GELU": "auto",
        "ERNIEM_FAST_LAYERNORM": "auto",
        "ERNIEM_FAST_PACKING": "1",
        "ERNIEM_FAST_RECOMPUTE": "0",
        "ERNIEM_FAST_VERIFY": "0",
    }


@pytest.mark.parametrize("op", flags.OPS)
def test_an_op_s_flag_takes_exactly_its_implementations(op):
    assert sorted(flags.OPS[op].values) == sorted(["auto", *ops.IMPLEMENTATIONS[op]])


@pytest.mark.parametrize("flag", flags.FLAGS.values(), ids=flags.FLAGS)
def test_every_valid_value_is_read_when_it_is_asked_for(flag, monkeypatch):
    for value in flag.values:
        monkeypatch.setenv(flag.name, value)
        assert flags.read(flag) == value
    monkeypatch.delenv(flag.name)
    assert flags.read(flag) == flag.default


@pytest.mark.parametrize("value", ["sideways", "", "OFF", " 1"])
@pytest.mark.parametrize("flag", flags.FLAGS.values(), ids=flags.FLAGS)
def test_unknown_value(flag, value, monkeypatch):
    monkeypatch.setenv(flag.name, value)
    with pytest.raises(ValueError, match=flag.name) as raised:
        flags.read(flag)
    assert repr(value) in str(raised.value)
    assert all(valid in str(raised.value) for valid in flag.values)


@pytest.mark.parametrize("name", ["ERNIEM_FAST_ATENTION", "ERNIEM_FAST_", "ERNIEM_FAST_attention"])
def test_unknown_name(name, monkeypatch):
    monkeypatch.setenv(name, "auto")
    with pytest.raises(ValueError, match=name) as raised:
        flags.check_names()
    assert all(known in str(raised.value) for known in flags.FLAGS)


def test_known_names_and_those_of_others_pass(monkeypatch):
    for name in (*flags.FLAGS, "ERNIEM_FASTER", "MY_ERNIEM_FAST_KERNELS"):
        monkeypatch.setenv(name, "0")
    flags.check_names()


def test_import_refuses_an_unknown_name():
    environment = {**os.environ, "ERNIEM_FAST_KERNEL": "off"}
    run = subprocess.run(
        [sys.executable, "-c", "import erniem_fast"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "ValueError: ERNIEM_FAST_KERNEL is not a flag" in run.stderr


def test_use_kernels_wins_over_the_environment_and_leaves_the_rest_alone(monkeypatch):
    monkeypatch.setenv(ATTENTION.name, "reference")
    monkeypatch.setenv(LAYERNORM.name, "torch")
    with use_kernels(attention="auto"):
        assert flags.read(ATTENTION) == "auto"
        assert flags.read(LAYERNORM) == "torch"
        monkeypatch.setenv(LAYERNORM.name, "reference")
        assert flags.read(LAYERNORM) == "reference"
    assert flags.read(ATTENTION) == "reference"


@pytest.mark.parametrize("op", flags.OPS)
def test_use_kernels_sets_the_op_that_it_names(op):
    """By the flags' names, of which one is not its op's; `use_implementations` takes the ops' own."""
    keyword = flags.OPS[op].name.removeprefix(flags.PREFIX).lower()
    for use in (use_kernels(**{keyword: "reference"}), use_implementations(**{op: "reference"})):
        with use:
            assert {each: flags.read(flag) for each, flag in flags.OPS.items()} == {
                each: "reference" if each == op else "auto" for each in flags.OPS
            }


def test_use_kernels_nests():
    with use_kernels(attention="torch", layernorm="torch"):
        with use_kernels(attention="reference"):
            assert (flags.read(ATTENTION), flags.read(LAYERNORM)) == ("reference", "torch")
            with use_kernels():
                assert flags.read(ATTENTION) == "reference"
        assert (flags.read(ATTENTION), flags.read(LAYERNORM)) == ("torch", "torch")
    assert (flags.read(ATTENTION), flags.read(LAYERNORM)) == ("auto", "auto")


def test_use_kernels_ends_with_an_exception():
    with pytest.raises(KeyError), use_kernels(attention="torch"):
        raise KeyError
    assert flags.read(ATTENTION) == "auto"


def test_use_kernels_refuses_an_unknown_value_and_changes_nothing():
    with use_kernels(attention="torch"):
        with (
            pytest.raises(ValueError, match=r"^layernorm='fast' ") as raised,
            use_kernels(attention="reference", layernorm="fast"),
        ):
            pytest.fail("the block must not run")
        assert flags.read(ATTENTION) == "torch"
    assert all(valid in str(raised.value) for valid in LAYERNORM.values)
    with pytest.raises(TypeError, match="gelu"):
        use_kernels(gelu="torch")


def test_use_kernels_is_a_thread_s_own():
    inside, done = threading.Barrier(3), threading.Barrier(3)
    seen = {}

    def read_inside(value):
        with use_kernels(attention=value):
            inside.wait(10)
            seen[value] = flags.read(ATTENTION)
            done.wait(10)

    threads = [threading.Thread(target=read_inside, args=(value,)) for value in ("torch", "reference")]
    for thread in threads:
        thread.start()
    inside.wait(10)
    seen["outside"] = flags.read(ATTENTION)
    done.wait(10)
    for thread in threads:
        thread.join()
    assert seen == {"torch": "torch", "reference": "reference", "outside": "auto"}


def test_use_kernels_is_a_task_s_own():
    async def read_inside(value):
        with use_kernels(attention=value):
            await asyncio.sleep(0)  # the other task enters its block here
            return flags.read(ATTENTION)

    async def both():
        return await asyncio.gather(read_inside("torch"), read_inside("reference"))

    assert asyncio.run(both()) == ["torch", "reference"]
    assert flags.read(ATTENTION) == "auto"


def test_held_flags_keep_their_values(monkeypatch):
    monkeypatch.setenv(ATTENTION.name, "reference")
    with use_kernels(layernorm="torch"), flags.held():
        monkeypatch.setenv(ATTENTION.name, "torch")
        monkeypatch.setenv(LAYERNORM.name, "reference")
        monkeypatch.setenv(flags.VERIFY.name, "1")
        assert [flags.read(flag) for flag in (ATTENTION, LAYERNORM, flags.VERIFY)] == ["reference", "torch", "0"]
        with use_kernels(attention="auto"):
            assert flags.read(ATTENTION) == "auto"
        assert flags.read(ATTENTION) == "reference"
    assert [flags.read(flag) for flag in (ATTENTION, LAYERNORM, flags.VERIFY)] == ["torch", "reference", "1"]


def test_held_flags_are_let_go_after_an_exception(monkeypatch):
    with pytest.raises(KeyError), flags.held():
        raise KeyError
    monkeypatch.setenv(ATTENTION.name, "torch")
    assert flags.read(ATTENTION) == "torch"


@pytest.mark.parametrize(("name", "value"), [("ERNIEM_FAST_KERNEL", "off"), ("ERNIEM_FAST_KERNELS", "of")])
def test_holding_refuses_what_the_environment_must_not_hold(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name}"), flags.held():
        pytest.fail("the block must not run")


def test_a_snapshot_holds_in_another_place_what_was_in_force(monkeypatch):
    """As a backward needs it, which can run outside of the block of its forward, and in another thread."""
    monkeypatch.setenv(ATTENTION.name, "reference")
    with use_kernels(layernorm="torch"):
        snapshot = flags.snapshot()
    monkeypatch.setenv(ATTENTION.name, "torch")
    monkeypatch.setenv(flags.VERIFY.name, "1")
    seen = []

    def read_held():
        with use_kernels(bias_gelu="reference"), flags.held(snapshot):
            assert flags.snapshot() is snapshot
            seen.extend(flags.read(flag) for flag in (ATTENTION, LAYERNORM, flags.OPS["bias_gelu"], flags.VERIFY))

    thread = threading.Thread(target=read_held)
    thread.start()
    thread.join()
    read_held()
    assert seen == 2 * ["reference", "torch", "auto", "0"]
    assert flags.read(ATTENTION) == "torch"


def test_what_depends_on_held_flags_is_computed_once(monkeypatch):
    calls = []

    @flags.while_held
    def value(argument):
        calls.append(argument)
        return flags.read(ATTENTION)

    with flags.held():
        snapshot = flags.snapshot()
        assert [value(1), value(1), value(2)] == ["auto"] * 3
        with use_kernels(attention="torch"):
            assert [value(1), value(1)] == ["torch"] * 2
    with flags.held(snapshot):
        assert value(2) == "auto"
    assert calls == [1, 2, 1, 1]
