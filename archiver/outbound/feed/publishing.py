"""Move committed changes from the outbox to the feed in one order for all readers.

Cursors are assigned here and not by the writers: a sequence would assign them before the commit, and a long
transaction could commit a smaller cursor after readers had passed it. One publisher at a time assigns them; its lock
is released after its commit is visible, and the next publisher continues after the greatest cursor. So cursors become
visible in order, and within an epoch without gaps.

The same transaction recomputes the summaries and contributions of the sessions of the page.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from archiver.archive import derived_rows
from archiver.database import Lock, as_json

CHANNEL = "archiver_events"
QUEUE_FULL = "54000"

# Limits of one transaction: rows read, and changes written. At least one row is taken.
PAGE_ROWS = 500
PAGE_CHANGES = 5_000

# Cursors that an earlier epoch may have assigned are not assigned again.
_NEWEST = """greatest((SELECT coalesce(max(cursor), 0) FROM archiver.changes),
                        (SELECT coalesce(max(given), 0) FROM archiver.epochs))"""

# A separate statement after the lock, so that it sees everything that the previous publisher committed.
_NOTIFY = """
        RETURNING cursor, type, session_id, chat_id, seal_id
    ), notified AS MATERIALIZED (
        SELECT CASE WHEN :notifies THEN
                   pg_notify(:channel, CASE WHEN octet_length(whole) < 8000 THEN whole ELSE bare END)
               END
          FROM (SELECT CAST(json_build_object('cursor', cursor, 'type', type, 'session_id', session_id,
                                              'chat_id', chat_id, 'seal_id', seal_id) AS text) AS whole,
                       CAST(json_build_object('cursor', cursor, 'type', type) AS text) AS bare
                  FROM published ORDER BY cursor) AS listed
    )
    SELECT (SELECT count(*) FROM notified) AS written, coalesce(max(cursor), 0) AS newest FROM published
"""
_PUBLISH = text(
    f"""
    WITH oldest AS MATERIALIZED (
        SELECT id, changed_at, changes FROM archiver.outbox ORDER BY id LIMIT :rows
    ), counted AS (
        SELECT id, changed_at, changes,
               sum(json_array_length(changes)) OVER (ORDER BY id) - json_array_length(changes) AS before
          FROM oldest
    ), page AS MATERIALIZED (
        SELECT id, changed_at, changes FROM counted WHERE before < :changes
    ), taken AS (
        DELETE FROM archiver.outbox WHERE id IN (SELECT id FROM page)
    ), published AS (
        INSERT INTO archiver.changes (cursor, type, session_id, chat_id, seal_id, changed_at, is_alone)
        SELECT {_NEWEST}
                   + row_number() OVER (ORDER BY page.id, listed.place),
               listed.change ->> 'type', coalesce(listed.change ->> 'session_id', ''), listed.change ->> 'chat_id',
               CAST(listed.change ->> 'seal_id' AS bigint), page.changed_at,
               CAST(listed.change ->> 'is_alone' AS boolean)
          FROM page CROSS JOIN LATERAL json_array_elements(page.changes) WITH ORDINALITY AS listed (change, place)
    {_NOTIFY}
    """  # noqa: S608  # only a constant is inserted, never input
).bindparams(rows=PAGE_ROWS, changes=PAGE_CHANGES, channel=CHANNEL)


def publish(connection: Connection, *, notifies: bool = True) -> int:
    """Publish the oldest committed page in this transaction; return the number of changes.

    Waits for a concurrent publisher. `notifies`: also send NOTIFY; the commit may then fail with SQLSTATE
    `QUEUE_FULL` if a listener stayed in a transaction so long that the notification queue is full.
    """
    Lock.PUBLISHING.take(connection, exclusive=True)
    page = connection.execute(_PUBLISH, {"notifies": notifies}).one()
    return _derive(connection, page.written, page.newest)


_SELECT_SESSIONS = text(
    """
    SELECT session_id, max(cursor) AS cursor FROM archiver.changes
     WHERE cursor > :before AND session_id <> '' GROUP BY session_id
    """
)


def _derive(connection: Connection, published: int, newest: int) -> int:
    """Recompute summaries and contributions of the sessions in the last `published` changes; return their number.

    A separate statement after the lock, so that it sees everything that writers and earlier holders committed.
    """
    if published:
        found = connection.execute(_SELECT_SESSIONS, {"before": newest - published})
        cursors = {row.session_id: row.cursor for row in found}
        derived_rows.refresh(connection, cursors)
    return published


_SELECT_ROWS = text(
    "SELECT id, changed_at, changes FROM archiver.outbox WHERE id > :after ORDER BY id LIMIT :rows"
).bindparams(rows=PAGE_ROWS)
_DELETE_ROWS = text("DELETE FROM archiver.outbox WHERE id IN (SELECT CAST(json_array_elements_text(:ids) AS bigint))")
# With their previous ids, so that the remaining changes of a session stay in order.
_KEEP = text(
    """
    INSERT INTO archiver.outbox (id, changed_at, changes) OVERRIDING SYSTEM VALUE
    SELECT id, changed_at, changes
      FROM json_to_recordset(:kept) AS k (id bigint, changed_at timestamptz, changes json)
    """
)
_PUBLISH_LISTED = text(
    f"""
    WITH published AS (
        INSERT INTO archiver.changes (cursor, type, session_id, chat_id, seal_id, changed_at, is_alone)
        SELECT {_NEWEST} + row_number() OVER (ORDER BY place),
               type, coalesce(session_id, ''), chat_id, seal_id, changed_at, is_alone
          FROM json_to_recordset(:listed)
               AS t (place int, type text, session_id text, chat_id text, seal_id bigint, changed_at timestamptz,
                     is_alone boolean)
    {_NOTIFY}
    """  # noqa: S608  # only a constant is inserted, never input
).bindparams(channel=CHANNEL)
MAX_SCANNED_PAGES = 20  # pages read per transaction


def publish_some(connection: Connection, chooses: Callable[[str], bool], *, notifies: bool) -> int:
    """Publish the oldest changes of the chosen sessions and keep the others in the outbox."""
    Lock.PUBLISHING.take(connection, exclusive=True)
    after, ids = 0, list[int]()
    listed: list[dict[str, Any]] = []
    postponed: list[dict[str, Any]] = []
    for _ in range(MAX_SCANNED_PAGES):
        page = connection.execute(_SELECT_ROWS, {"after": after}).all()
        for row in page:
            chosen = [each for each in row.changes if chooses(each.get("session_id", ""))]
            if chosen:
                ids.append(row.id)
                listed += [
                    {**each, "changed_at": row.changed_at, "place": len(listed) + n} for n, each in enumerate(chosen)
                ]
            if chosen and len(chosen) < len(row.changes):
                rest = [each for each in row.changes if not chooses(each.get("session_id", ""))]
                postponed.append({"id": row.id, "changed_at": row.changed_at, "changes": rest})
        if len(page) < PAGE_ROWS or len(listed) >= PAGE_CHANGES:
            break
        after = page[-1].id
    if not listed:
        return 0
    listed = [{**each, "place": place} for place, each in enumerate(listed)]
    page = connection.execute(_PUBLISH_LISTED, {"listed": as_json(listed), "notifies": notifies}).one()
    connection.execute(_DELETE_ROWS, {"ids": as_json(ids)})
    if postponed:
        connection.execute(_KEEP, {"kept": as_json(postponed)})
    return _derive(connection, page.written, page.newest)


def select_oldest_sessions(connection: Connection) -> list[str]:
    """Return the distinct sessions of the oldest page in order; "" stands for changes without a session."""
    page = connection.execute(_SELECT_ROWS, {"after": 0}).all()
    return list(dict.fromkeys(each.get("session_id", "") for row in page for each in row.changes))


def select_queue_usage(connection: Connection) -> float:
    """Return how full the notification queue of Postgres is, from 0 to 1.

    The query makes Postgres free the notifications that all listeners have read; otherwise only a new notification
    does so.
    """
    return float(connection.scalar(text("SELECT pg_notification_queue_usage()")) or 0)


PAGE_DELETED = 5_000  # old changes per transaction

# Deletes from the oldest change up to the first one that stays, so that the feed has no gap. The newest change always
# stays, because the next cursor is derived from it.
_DELETE_OLD = text(
    """
    WITH page AS MATERIALIZED (
        SELECT cursor, changed_at FROM archiver.changes
         WHERE cursor < (SELECT max(cursor) FROM archiver.changes) AND cursor <= :through
         ORDER BY cursor LIMIT :most
    )
    DELETE FROM archiver.changes
     WHERE cursor <= (SELECT max(cursor) FROM page)
       AND cursor < coalesce((SELECT min(cursor) FROM page WHERE changed_at >= :before), 9223372036854775807)
    """
).bindparams(most=PAGE_DELETED)

_ALL = 2**63 - 1


def delete_old(connection: Connection, before: datetime, consumed: int | None = None) -> int:
    """Delete a page of the oldest changes made before this time; return their number.

    `consumed`: the cursor up to which all consumers have read; None if there is no consumer.
    """
    through = _ALL if consumed is None else consumed
    return connection.execute(_DELETE_OLD, {"before": before, "through": through}).rowcount
