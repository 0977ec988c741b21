"""Parts of the archive anew, a page at a time, from the ledger alone (I10)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, text

from archiver.projection import rederive, rows
from archiver.projection.coverage import Timing
from archiver.projection.facts import UNPLACED, select_unplaced
from archiver.projection.turns import fold

# Of one transaction; a session with more has one of its own.
PAGE_EVENTS = 2_000
PAGE_BYTES = 16 * 1_048_576
SESSIONS_A_PAGE = 500
UNPLACED_A_PAGE = 1_000


class Page(msgspec.Struct, frozen=True):
    """What a step has done: ledger rows read, and the last key it came to; None: it was the last step."""

    events: int
    last: str | None


# Ids in the order that Postgres gives them, of the ledger and of the archive alike.
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


def replay_sessions(connection: Connection, after: str, timing: Timing) -> Page:
    """Make the next sessions after this id anew, as many as fit into a page together, but at least one."""
    found = connection.execute(_PAGE, {"after": after, "most": SESSIONS_A_PAGE}).all()
    taken = _take(found)
    # Locks them, so that what is recorded meanwhile projects itself afterwards.
    heard = {row.session_id: [row.first, row.last] for row in taken if row.events}
    rows.upsert_sessions(connection, heard, timing)
    rows.lock_sessions(connection, [row.session_id for row in taken if not row.events])
    rederive(connection, [row.session_id for row in taken], timing)
    is_last = len(taken) == len(found) < SESSIONS_A_PAGE
    return Page(sum(row.events for row in taken), None if is_last else taken[-1].session_id)


def _take(found: Sequence[Row[Any]]) -> Sequence[Row[Any]]:
    events = size = 0
    for number, row in enumerate(found):
        events += row.events
        size += row.bytes
        if number and (events > PAGE_EVENTS or size > PAGE_BYTES):
            return found[:number]
    return found


def replay_unplaced(connection: Connection, after: str) -> Page:
    """Make the next turns whose session is not known anew. The caller holds the ledger's lock alone."""
    facts = select_unplaced(connection, after, UNPLACED_A_PAGE)
    last = None if len(facts) < UNPLACED_A_PAGE else next(reversed(facts))
    rows.delete_unplaced_between(connection, after, last)
    homes: dict[str, list[str]] = defaultdict(list)
    for session_id, chat_id in rows.select_homes(connection, facts):
        homes[chat_id].append(session_id)
    homeless = {(UNPLACED, chat_id): fold(told) for chat_id, told in facts.items() if not homes[chat_id] and told}
    rows.upsert_turns(connection, homeless)
    return Page(sum(map(len, facts.values())), last)
