"""Fixtures of the tests that need Postgres but no process."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.conftest import Cluster
from tests.support.histories import Archive


@pytest.fixture
def archive(engine: Engine) -> Archive:
    return Archive(engine)


@pytest.fixture
def empty(cluster: Cluster, empty_database_url: str) -> Iterator[Engine]:
    """An engine of a database without a schema."""
    engine = cluster.engine(empty_database_url)
    yield engine
    engine.dispose()
