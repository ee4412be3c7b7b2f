"""Seconds of calls, and their quartiles."""

import time
from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.timing import Flush, Quartiles, quartiles, time_call

CPU = torch.device("cpu")


def test_quartiles_interpolate_as_numpy_does():
    assert quartiles([4.0, 1.0, 2.0, 3.0]) == Quartiles(1.75, 2.5, 3.25)


@pytest.fixture
def clock(monkeypatch):
    """Makes every call take as many seconds as it returns."""
    monkeypatch.setattr(timing, "time_call", lambda call, device, flush: call())


def test_calls_take_turns_in_alternating_order(clock):
    called = []
    calls = [lambda: called.append("a") or 1.0, lambda: called.append("b") or 2.0]
    assert timing.take_turns(calls, 2, CPU) == [[1.0, 1.0], [2.0, 2.0]]
    assert "".join(called) == "ba" + "ab" + "ba" + "ab" + "ba"


def test_a_call_on_the_cpu_takes_its_own_time():
    taken = time_call(lambda: time.sleep(0.01), CPU)
    assert 0.01 <= taken.seconds < 1
    assert taken.host is None


class Gpu:
    """A model of a GPU: the host launches kernels, which run one after another; times are in microseconds."""

    READ = 130  # of the flush's buffer, on an H200

    def __init__(self):
        self.now = 0  # the host's clock
        self.free = 0  # when the last kernel ends
        self.launched = 0

    def launch(self, host, kernel):
        """The host takes `host` to launch a kernel of `kernel`."""
        self.now += host
        self.free = max(self.free, self.now) + kernel
        self.launched += 1

    def wait(self):
        self.now = max(self.now, self.free)

    def sum(self):
        self.launch(2, self.READ)

    def event(self, enable_timing):
        class Event:
            def record(event):
                event.at = max(self.now, self.free)

            def query(event):
                return self.now >= event.at

            def synchronize(event):
                self.now = max(self.now, event.at)

            def elapsed_time(event, end):
                return (end.at - event.at) / 1e3

        assert enable_timing
        return Event()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gpu.wait())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: gpu.now / 1e6))
    return gpu


@pytest.mark.parametrize("host", [20, 500, 3000])
def test_a_slow_host_does_not_count(gpu, host):
    """Two kernels of 30 microseconds take 60, however long Python takes to launch them."""

    def call():
        gpu.launch(host, 30)
        gpu.launch(host, 30)

    taken = time_call(call, torch.device("cuda"), Flush(gpu))
    assert taken == pytest.approx((60e-6, 2 * host * 1e-6))


def test_a_call_that_waits_for_its_kernels_is_timed_all_the_same(gpu):
    """However long the GPU is kept busy before, it runs dry when the call waits: for 20 microseconds."""

    def call():
        gpu.launch(5, 30)
        gpu.wait()
        gpu.launch(20, 30)

    taken = time_call(call, torch.device("cuda"), Flush(gpu))
    assert taken.seconds == pytest.approx(80e-6)
    assert gpu.launched < 200
