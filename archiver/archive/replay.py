"""Rebuild parts of the archive from the ledger, a page at a time (I10)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, text

from archiver.archive import rederive, rows
from archiver.archive.coverage import Timing
from archiver.archive.facts import UNASSIGNED, select_unassigned
from archiver.archive.turns import fold

# Of one transaction; a session with more has one of its own.
PAGE_EVENTS = 2_000
PAGE_BYTES = 16 * 1_048_576
SESSIONS_PER_PAGE = 500
UNASSIGNED_PER_PAGE = 1_000


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
    """Rebuild the next sessions after this id: a page of them, but at least one."""
    rows_found = connection.execute(_PAGE, {"after": after, "most": SESSIONS_PER_PAGE}).all()
    taken = _take(rows_found)
    # Locks them, so that concurrent events are projected afterwards.
    arrivals = {row.session_id: [row.first, row.last] for row in taken if row.events}
    rows.upsert_sessions(connection, arrivals, timing)
    rows.lock_sessions(connection, [row.session_id for row in taken if not row.events])
    rederive(connection, [row.session_id for row in taken], timing)
    is_last = len(taken) == len(rows_found) < SESSIONS_PER_PAGE
    return Page(sum(row.events for row in taken), None if is_last else taken[-1].session_id)


def _take(found: Sequence[Row[Any]]) -> Sequence[Row[Any]]:
    events = size = 0
    for number, row in enumerate(found):
        events += row.events
        size += row.bytes
        if number and (events > PAGE_EVENTS or size > PAGE_BYTES):
            return found[:number]
    return found


def replay_unassigned(connection: Connection, after: str) -> Page:
    """Rebuild the next unassigned turns. Requires the exclusive lock."""
    facts = select_unassigned(connection, after, UNASSIGNED_PER_PAGE)
    last = None if len(facts) < UNASSIGNED_PER_PAGE else next(reversed(facts))
    rows.delete_unassigned_between(connection, after, last)
    sessions_of_chat: dict[str, list[str]] = defaultdict(list)
    for session_id, chat_id in rows.select_sessions_of_chats(connection, facts):
        sessions_of_chat[chat_id].append(session_id)
    unassigned = {
        (UNASSIGNED, chat_id): fold(own_facts)
        for chat_id, own_facts in facts.items()
        if not sessions_of_chat[chat_id] and own_facts
    }
    rows.upsert_turns(connection, unassigned)
    return Page(sum(map(len, facts.values())), last)
