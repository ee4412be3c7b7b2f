"""The rates of a machine, and the floors that follow."""

import torch

from bench import roofline
from bench.roofline import Rates, Work
from bench.timing import Taken

CPU = torch.device("cpu")


def test_rates_count_what_is_read_and_written_and_take_the_fastest_product(monkeypatch):
    taken = [[Taken(seconds, None)] for seconds in (0.5, 0.75, 0.25)]
    monkeypatch.setattr(roofline, "take_turns", lambda calls, rounds, device, warm_up: taken)
    rates = roofline.measure_rates(CPU, torch.float32)
    assert rates == Rates(bytes_per_second=2 * 2**26 / 0.5, flops_per_second=2 * 2048**3 / 0.25)


def test_a_floor_is_the_longer_of_computing_and_copying():
    rates = Rates(flops_per_second=10.0, bytes_per_second=2.0)
    assert Work(flops=50.0, bytes=4.0).floor(rates) == 5.0
    assert Work(flops=50.0, bytes=14.0).floor(rates) == 7.0
