"""Errors in bfloat16 are those of rounding; `test_mutants.py` rounds more."""

import pytest

from tests.kernels.rounding import ERRORS, errors, rounds_little

CASES = [(op, shape) for op, shapes in ERRORS.items() for shape in shapes]


@pytest.mark.parametrize(("op", "shape"), CASES)
def test_errors_are_those_of_rounding(op, shape):
    assert rounds_little(op, shape), errors(op, shape)
