"""Checkpoints that several tests load."""

import pytest

from tests.embedding import tiny


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint(family, tmp_path_factory):
    """The folder of a bare model."""
    return tiny.save(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="session", params=[1, 3], ids=["one-label", "three-labels"])
def classifier(request, family, tmp_path_factory):
    """The folder of a classifier."""
    return tiny.save(family, tmp_path_factory.mktemp(family), request.param)
