"""Fixtures that tests of the model share."""

import pytest

from tests.model.tiny import load


@pytest.fixture
def model():
    return load()
