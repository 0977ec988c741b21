"""Rebuild the archive from the ledger by session (I10): readers never see it empty; memory is bounded.

The receiver keeps running: a page of sessions is locked while it is rebuilt, and later events are projected after it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, func, select, text

from archiver.archive import Timing, rederive, rows, unassigned, without_events
from archiver.archive.outbox import insert_changes
from archiver.database import Lock, run, tables

CONFLICT_RETRIES = 10
# Limits of one transaction; a session that exceeds them is rebuilt in its own transaction.
PAGE_EVENTS = 2_000
PAGE_BYTES = 16 * 1_048_576
SESSIONS_PER_PAGE = 500

Page = tuple[int, str | None]  # ledger rows read, and the last key, which is None on the last page


def count_events(connection: Connection) -> int:
    """Return the number of ledger rows to read."""
    return connection.scalar(select(func.count()).select_from(tables.events)) or 0


def rebuild(engine: Engine, timing: Timing) -> Iterator[int]:
    """Rebuild every session, then unassigned turns; yield the number of ledger rows read in each step.

    If it is stopped halfway, some sessions have been rebuilt and the others are unchanged.
    """
    yield from _pages(engine, lambda connection, after: _replay_sessions(connection, after, timing), exclusive=False)
    yield from _pages(engine, unassigned.replay, exclusive=True)


def _pages(engine: Engine, replay: Callable[[Connection, str], Page], *, exclusive: bool) -> Iterator[int]:
    after: str | None = ""
    while after is not None:
        events, after = _page(engine, replay, after, exclusive=exclusive)
        yield events


def _page(engine: Engine, replay: Callable[[Connection, str], Page], after: str, *, exclusive: bool) -> Page:
    def work(connection: Connection) -> Page:
        Lock.RECORDING.take(connection, exclusive=exclusive)
        return replay(connection, after)

    return run(engine, work, statement_seconds=600, lock_seconds=120, retries=CONFLICT_RETRIES)


# Ids of the ledger and of the archive, in the sort order of Postgres.
_PAGE = text(
    """
    WITH page AS MATERIALIZED (
        (SELECT session_id, count(*) AS events, sum(octet_length(body)) AS bytes,
                min(received_at) AS first, max(received_at) AS last
           FROM archiver.events WHERE session_id > :after GROUP BY session_id ORDER BY session_id LIMIT :most)
        UNION ALL
        (SELECT session_id, 0, sum(octet_length(content)), NULL, NULL
           FROM archiver.pieces WHERE session_id > :after GROUP BY session_id ORDER BY session_id LIMIT :most)
        UNION ALL
        (SELECT session_id, 0, NULL, NULL, NULL
           FROM archiver.sessions WHERE session_id > :after ORDER BY session_id LIMIT :most)
    )
    SELECT session_id, sum(events)::bigint AS events, coalesce(sum(bytes), 0)::bigint AS bytes,
           min(first) AS first, max(last) AS last
      FROM page GROUP BY session_id ORDER BY session_id LIMIT :most
    """
)


def _replay_sessions(connection: Connection, after: str, timing: Timing) -> Page:
    """Rebuild one page of the sessions after this id. A session that exceeds the limits has its own page."""
    rows_found = connection.execute(_PAGE, {"after": after, "most": SESSIONS_PER_PAGE}).all()
    taken = _take(rows_found)
    # Locks them, so that concurrent events are projected afterwards.
    arrivals = {row.session_id: [row.first, row.last] for row in taken if row.events}
    rows.upsert_sessions(connection, arrivals, timing)
    rows.lock_sessions(connection, [row.session_id for row in taken if not row.events])
    changes = rederive(connection, [row.session_id for row in taken], timing)
    insert_changes(connection, without_events(changes))
    is_last = len(taken) == len(rows_found) < SESSIONS_PER_PAGE
    return sum(row.events for row in taken), None if is_last else taken[-1].session_id


def _take(found: Sequence[Row[Any]]) -> Sequence[Row[Any]]:
    events = size = 0
    for number, row in enumerate(found):
        events += row.events
        size += row.bytes
        if number and (events > PAGE_EVENTS or size > PAGE_BYTES):
            return found[:number]
    return found
