"""A server of Postgres that the tests of a module may break, and a migrated database of it for each."""

from collections.abc import Iterator

import pytest

from archiver import embedded
from tests.conftest import Cluster
from tests.support import servers


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Postgres]:
    """A server of our own, to be broken."""
    with embedded.running(
        tmp_path_factory.mktemp(servers.fresh_name("outages")), options={"max_connections": "50"}
    ) as postgres:
        yield postgres


@pytest.fixture(scope="module")
def own(postgres: embedded.Postgres) -> Cluster:
    return Cluster("18", postgres.database_url("DATABASE").replace("DATABASE", "{database}"))


@pytest.fixture
def url(own: Cluster) -> Iterator[str]:
    url = own.clone()
    yield url
    own.drop(url)
