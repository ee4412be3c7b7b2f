"""Fixtures that the situations share."""

import pytest

from erniem_fast import ErnieMTokenizer
from tests.golden import cases


@pytest.fixture(scope="module")
def tokenizer():
    return ErnieMTokenizer.from_pretrained(cases.TINY)
