"""When a result counts as the reference's."""

from math import inf, nan

import pytest
import torch

from erniem_fast.verification.equivalence import Comparison, compare, draw


def test_the_bound():
    exact = torch.tensor([0.0, 4.0], dtype=torch.float64)
    same = torch.tensor([0.25, 4.0])
    comparison = compare(torch.tensor([0.0, 3.5]), (same, exact))
    assert comparison == Comparison(error=0.5, bound=0.5 + 8 * 2.0**-23 * 4)
    assert comparison.holds
    assert not compare(torch.tensor([0.0, 3.49]), (same, exact)).holds
    assert compare(torch.tensor([0.0, 3.49]).half(), (same, exact)).bound == 0.5 + 8 * 2.0**-10 * 4
    assert compare(exact[:0], (same[:0], exact[:0])).holds


@pytest.mark.parametrize(("error", "bound"), [(nan, 1.0), (inf, 1.0), (1.0, nan), (nan, nan), (1.0, 0.0)])
def test_what_is_no_number_exceeds_every_bound(error, bound):
    comparison = Comparison(error, bound)
    assert not comparison.holds
    assert comparison.ratio == inf


def test_results_below_normal_numbers_are_held_to_units_of_theirs():
    """Rounding an exact 1e-7 in float16 costs up to 3e-8, whichever way the reference happens to round it."""
    exact = torch.tensor([1e-7], dtype=torch.float64)
    same = exact.half()
    assert compare(same + 2.0**-24, (same, exact)).holds
    assert compare(same, (same, exact)).bound <= 2 * (same - exact).abs().item() + 8 * 2.0**-24
    assert not compare(same + 2.0**-20, (same, exact)).holds


def half(*values):
    return torch.tensor(values, dtype=torch.float16)


@pytest.mark.parametrize("same", [6e4, inf, nan])
def test_a_result_may_overflow_where_the_exact_one_does(same):
    exact = torch.tensor([1e5], dtype=torch.float64)
    for result, holds in ((inf, True), (65504.0, True), (-inf, False), (1e4, False)):
        assert compare(half(result), (half(same), exact)).holds is (holds or (result == -inf and same is nan))
    assert compare(half(nan), (half(same), exact)).holds is (same is nan)


@pytest.mark.parametrize("failure", [inf, -inf, nan])
def test_a_result_may_fail_where_the_reference_fails_alone(failure):
    """And is held to the bound of the other numbers where it has one."""
    exact = torch.tensor([100.0, 1.0], dtype=torch.float64)
    same = half(failure, 1.0)
    for first, holds in ((nan, True), (inf, True), (100.0, True), (101.0, False), (0.0, False)):
        assert compare(half(first, 1.0), (same, exact)).holds is holds
    for second in (nan, inf, 2.0):
        assert not compare(half(failure, second), (same, exact)).holds
    assert not compare(half(failure, 1.0), (half(100.0, 1.0), exact)).holds


def test_where_the_exact_result_is_no_number_no_result_is():
    """A number would hide, from a loss's scaler for one, that an input was none."""
    exact = torch.tensor([nan, 1.0], dtype=torch.float64)
    assert compare(half(nan, 1.0), (half(nan, 1.0), exact)).holds
    assert not compare(half(3.0, 1.0), (half(nan, 1.0), exact)).holds
    assert not compare(half(nan, 2.0), (half(nan, 1.0), exact)).holds


@pytest.mark.parametrize(("numbers", "count"), [(1, 16), (5, 16), (100, 3), (255, 2), (256, 1), (5000, 1)])
def test_few_numbers_are_no_sample_of_the_reference_s_error(numbers, count):
    """Zeros, as of dropout, are not among them. All draws but the first are of neighbours, in both dtypes."""
    seen = []

    def oracle(x, p):
        seen.append(x)
        return (3 * x,)

    x = torch.cat([torch.randn(numbers), torch.zeros(1000)])
    draws = draw(oracle, (x, 0.5))
    assert len(draws) == count
    assert torch.equal(seen[0], x)
    for same, exact in zip(seen[::2], seen[1::2], strict=True):
        assert (same.dtype, exact.dtype) == (torch.float32, torch.float64)
        assert torch.equal(same.double(), exact)
        assert ((same - x).abs() <= 2.5 * 2.0**-23 * x.abs()).all()
    assert count == 1 or any(not torch.equal(same, x) for same in seen[2::2])


def test_the_bound_is_that_of_the_largest_error_of_all_draws():
    exact, result = torch.tensor([4.0], dtype=torch.float64), torch.tensor([4.5])
    lucky, other = (torch.tensor([4.0]), exact), (torch.tensor([5.25]), exact + 1)
    assert not compare(result, lucky).holds
    assert compare(result, lucky, other) == Comparison(error=0.5, bound=0.5 + 8 * 2.0**-23 * 4)


def test_terms_that_cancel_in_every_draw_set_the_slack():
    zero, exact, unit = torch.zeros(2), torch.zeros(2, dtype=torch.float64), 2.0**-23
    fused = torch.tensor([0.0, 40 * unit])
    assert compare(fused, (zero, exact), terms=40.0) == Comparison(error=40 * unit, bound=8 * 40 * unit)
    assert not compare(fused, (zero, exact)).holds
    assert not compare(9 * fused, (zero, exact), terms=40.0).holds
    # Not where the reference is 0 by luck, or the exact result is no zero:
    assert not compare(fused, (zero, exact), (zero + 1e-9, exact), terms=40.0).holds
    assert not compare(fused, (zero, exact + 1e-9), terms=40.0).holds
