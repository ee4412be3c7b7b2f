"""What the tests of pre-training share."""

import pytest

from erniem_fast import ErnieMTokenizer
from tests.golden import cases


@pytest.fixture(scope="session")
def tokenizer():
    return ErnieMTokenizer.from_pretrained(cases.TINY)
