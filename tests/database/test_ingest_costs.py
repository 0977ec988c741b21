"""What Postgres is asked to do for a batch of events, and when: round trips, statements, rows read, COMMIT."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from archiver import events, ledger
from archiver.database import transaction
from archiver.events import Delivery, Event
from tests.conftest import Cluster
from tests.support.fetched_rows import count_fetched, keep_without_statistics
from tests.support.payloads import created
from tests.support.proxies import proxied

ON_ONE_VERSION = True  # what is sent does not depend on it

PREPARED = 10  # transactions after which the driver prepares each statement, and Postgres keeps its plan
OTHERS = 300
# For a batch of new events of sessions that were never read.
ROUND_TRIPS, STATEMENTS = 5, 12


def batch(name: str, size: int = 4) -> Sequence[Delivery[Event]]:
    """Events of two turns in each session."""
    parsed = [events.parse(created(f"{name}-{number}", f"{name}-{number // 2}")) for number in range(size)]
    return [Delivery(each, datetime.now(UTC), "key") for each in parsed if isinstance(each, Event)]


def test_a_batch_reads_the_same_rows_however_many_other_events_there_are(engine: Engine) -> None:
    """With a plan made while the tables were empty, Postgres once read the whole ledger for each batch."""
    keep_without_statistics(engine)
    fetched = []
    for others in (PREPARED, OTHERS):
        for number in range(others):
            with transaction(engine) as connection:
                ledger.record(connection, batch(f"{others}-{number}", 1))
        with transaction(engine) as connection:
            before = count_fetched(connection)
            # A revision of a known turn reads the turn as stored.
            ledger.record(connection, [*batch(f"new-{others}"), *batch(f"{others}-0", 2)])
            fetched.append(count_fetched(connection) - before)
    assert fetched[1] <= fetched[0] + 5


def test_a_batch_takes_few_round_trips_and_statements(cluster: Cluster, database_url: str) -> None:
    with proxied(database_url) as (proxy, url):
        engine = cluster.engine(url, pool_size=1)
        for number in range(PREPARED):
            with transaction(engine) as connection:
                ledger.record(connection, batch(f"prepared-{number}"))
        proxy.requests.clear()
        with transaction(engine) as connection:
            ledger.record(connection, batch("measured"))
        requests = proxy.requests.copy()
        engine.dispose()
    assert requests["E"] <= STATEMENTS
    assert requests["S"] <= ROUND_TRIPS + 1  # a pipeline that ends with COMMIT has two
    assert requests["P"] <= 2  # BEGIN and COMMIT, which the driver does not prepare


@pytest.mark.parametrize("size", [1, 4])
def test_a_transaction_whose_commit_was_answered_succeeds_although_the_connection_is_lost(
    cluster: Cluster, database_url: str, size: int
) -> None:
    """Otherwise its events would be stored twice, and counted as delivered twice."""
    with proxied(database_url) as (proxy, url):
        engine = cluster.engine(url, pool_size=1)
        with transaction(engine) as connection:
            ledger.record(connection, batch("first", size))
            proxy.set("answer")
        assert proxy.swallowed == 1
        proxy.set("pass")
        with transaction(engine) as connection:
            ledger.record(connection, batch("second", size))
            assert connection.scalar(text("SELECT count(*) FROM archiver.events")) == 2 * size
        engine.dispose()


def test_a_transaction_whose_commit_was_not_answered_fails(cluster: Cluster, database_url: str) -> None:
    with proxied(database_url) as (proxy, url):
        engine = cluster.engine(url, pool_size=1)

        def record() -> None:
            with transaction(engine) as connection:
                ledger.record(connection, batch("first"))
                proxy.set("swallow")

        with pytest.raises(OperationalError):
            record()
        engine.dispose()


def test_what_was_deferred_is_forgotten_with_its_transaction(engine: Engine) -> None:
    with transaction(engine) as connection:
        ledger.record(connection, batch("rolled back"))
        connection.rollback()
    with transaction(engine) as connection:
        ledger.record(connection, batch("kept"))
    with transaction(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM archiver.messages")) == 8
        assert connection.scalar(text("SELECT count(*) FROM archiver.outbox")) == 1


def test_a_batch_that_does_not_fit_into_the_buffers_of_the_connection_is_stored(engine: Engine) -> None:
    """COMMIT once waited for its answer while a part of the rows before it had not been sent."""
    bodies = [events.parse(created(f"large-{number}", "s", input="large " * 50_000)) for number in range(30)]
    with transaction(engine) as connection:
        ledger.record(
            connection, [Delivery(each, datetime.now(UTC), "key") for each in bodies if isinstance(each, Event)]
        )
    with transaction(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM archiver.chats")) == 30
