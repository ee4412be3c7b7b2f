"""From seconds to figures: rates, ratios, latencies, differences."""

import numpy as np
import pytest
import torch
from runs import measured

from bench.difference import difference, row_error
from bench.model.figures import Latency
from bench.model.rivals import OURS_NAMES
from bench.model.summary import summarise
from bench.timing import Quartiles


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


def test_a_peer_is_compared_with_ours_whose_weights_have_its_form():
    seconds = {"erniem_fast": 4.0, "erniem_fast packed": 3.0, "erniem_fast bfloat16": 2.0, "erniem_fast int8": 1.0}
    theirs = {None: 6.0, "packed": 6.0, "bfloat16": 6.0, "int8": 0.5}
    ours = [measured(name, [[s]], weights=name.partition(" ")[2] or None) for name, s in seconds.items()]
    others = [measured(f"old {form}", [[s]], weights=form) for form, s in theirs.items()]

    def ratios(measurements):
        return [peer.speedup and peer.speedup.median for peer in summarise(measurements, OURS_NAMES)[0].peers]

    assert ratios([*ours, *others]) == [None] * 4 + [1.5, 2.0, 3.0, 0.5]
    assert ratios([ours[0], *others]) == [None, 1.5, 1.5, 1.5, 0.125]


def test_a_batch_s_time_is_that_of_all_rounds():
    (job,) = summarise([measured("erniem_fast", [[0.1, 0.2], [0.3, 0.9]])], OURS_NAMES)
    assert job.peers[0].batch_seconds == Latency(0.25, pytest.approx(0.882))
    # Four rows, in 0.3 and in 1.2 seconds.
    assert job.peers[0].rows_per_second == pytest.approx((4 / 0.3 + 4 / 1.2) / 2)


def test_difference_is_relative_to_the_root_mean_square():
    reference = torch.tensor([[3.0, -4.0]])
    assert difference(torch.tensor([[3.0, -3.0]]), reference) == pytest.approx(1 / np.sqrt(12.5))
    assert difference(reference[:, :1], reference) == float("inf")


def test_the_error_of_a_row_is_relative_to_it_unless_it_is_small():
    exact = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    size = 5 * (101 / 6) ** 0.5  # the root mean square of all
    assert row_error(exact + torch.tensor([0.0, 1.0]), exact) == pytest.approx(0.5**0.5 / size)
    assert row_error(exact * torch.tensor([[1.0], [1.1], [1.0]]), exact) == pytest.approx(0.1)
    assert row_error(exact[:, :1], exact) == float("inf")
    assert np.isnan(row_error(exact * float("nan"), exact))
