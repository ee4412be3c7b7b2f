"""Chooses the library of the matrix products, which is otherwise that which was fastest."""

from contextlib import contextmanager
from unittest import mock

import pytest

from erniem_fast.matmul import dispatch
from erniem_fast.matmul.libraries import LIBRARIES, available

every_library = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in available(), reason=f"there is no {name} here"))
        for name in LIBRARIES
    ],
)


@contextmanager
def products_by(name):
    """As if a library were the fastest for every product; yields the calls of it, as (tokens, out_features)."""
    calls, multiply = [], LIBRARIES[name]

    def counted(x, weight, bias, out):
        calls.append((x.shape[0], weight.shape[0]))
        return multiply(x, weight, bias, out)

    chosen = mock.patch.object(dispatch, "fastest", return_value=name)
    with chosen, mock.patch.dict(LIBRARIES, {name: counted}):
        yield calls
