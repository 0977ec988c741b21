"""What it costs to keep the derived rows of sessions and the search index."""

from collections.abc import Callable

import pytest
from sqlalchemy import Connection, Engine

from archiver.archive import search
from archiver.database import transaction
from archiver.outbound import feed
from tests.support.fetched_rows import count_fetched, keep_without_statistics
from tests.support.observations import record
from tests.support.payloads import created
from tests.support.searching import index

ON_ONE_VERSION = True  # the plans are those of any version

OTHERS = 300


def _publish(connection: Connection) -> None:
    feed.publish(connection)


def _index(connection: Connection) -> None:
    feed.publish(connection)
    page = search.select_page(connection)
    assert page is not None
    search.index_page(connection, page)


@pytest.mark.parametrize("step", [_publish, _index])
def test_a_change_costs_the_same_however_many_other_sessions_there_are(
    engine: Engine, step: Callable[[Connection], None]
) -> None:
    """Without statistics, Postgres once read all sessions for each page of changes."""
    keep_without_statistics(engine)
    costs = []
    index(engine, "simple")
    for others in (0, OTHERS):
        record(engine, *(created(f"other-{number}", f"session-{number}") for number in range(others)))
        index(engine)
        record(engine, created(f"chat-{others}", f"new-{others}"))
        with transaction(engine) as connection:
            before = count_fetched(connection)
            step(connection)
            costs.append(count_fetched(connection) - before)
            connection.rollback()
    assert costs[1] <= costs[0] + 5


def test_a_page_of_changes_has_their_number_also_if_they_are_about_one_turn(engine: Engine) -> None:
    """From which the pace of the index is computed."""
    index(engine, "simple")
    record(engine, created("chat-1"), created("chat-1", status="failed", updatedAt="2024-01-15T09:31:00Z"))
    record(engine, created("chat-1", status="ended", updatedAt="2024-01-15T09:32:00Z"))
    with transaction(engine) as connection:
        feed.publish(connection)
        page = search.select_page(connection)
    assert page is not None
    assert (page.size, len(page.items)) == (2, 1)
