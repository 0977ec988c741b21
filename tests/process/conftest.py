"""Fixtures of the tests that start processes."""

from collections.abc import Iterator

import pytest

from tests.conftest import Cluster


@pytest.fixture(scope="module")
def url(cluster: Cluster) -> Iterator[str]:
    """A migrated database for all tests of a module that do no harm to it."""
    url = cluster.clone()
    yield url
    cluster.drop(url)
