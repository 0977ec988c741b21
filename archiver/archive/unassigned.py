"""Rebuild unassigned turns, of which no fact names a session, and find the sessions of their chats.

Their facts stay in the ledger under the session id `UNASSIGNED`. Such a fact belongs to every session that is known
to contain its chat; until one is known, the turn is archived under the same empty id. Each function that writes
requires `Lock.RECORDING`, exclusive, because a session may become known at any time.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import Connection

from archiver.archive import rows
from archiver.archive.facts import UNASSIGNED, select_unassigned, select_unassigned_of
from archiver.archive.turns import Fact, fold

PAGE = 1_000


def current_sessions(of: str, to: str) -> str:
    """Return the SQL of CTEs: `to` has cursor, session_id and chat_id of the changes in `of`.

    For a change that was recorded without a session, it is the session to which the chat is now assigned.
    """
    return f"""
    assigned AS MATERIALIZED (
        SELECT t.cursor, min(c.session_id) AS session_id
          FROM {of} t JOIN archiver.chats c ON c.chat_id = t.chat_id
         WHERE t.session_id = '' AND c.session_id <> '' GROUP BY t.cursor
    ), {to} AS MATERIALIZED (
        SELECT t.cursor, coalesce(h.session_id, t.session_id) AS session_id, t.chat_id
          FROM {of} t LEFT JOIN assigned h ON h.cursor = t.cursor
    )
    """  # noqa: S608  # only constant names are inserted, never input


def lock_sessions(connection: Connection, session_ids: Iterable[str], chat_ids: Collection[str]) -> list[str]:
    """Lock these sessions and all that contain these unassigned chats; return their ids in order."""
    sessions = {*session_ids, *(session_id for session_id, _ in rows.select_sessions_of_chats(connection, chat_ids))}
    locked = sorted(sessions - {UNASSIGNED})
    rows.lock_sessions(connection, locked)
    return locked


def rederive(connection: Connection, chat_ids: Sequence[str]) -> None:
    """Rebuild the unassigned turns of these chats from their facts."""
    if chat_ids:
        facts = select_unassigned_of(connection, chat_ids)
        rows.delete_unassigned(connection, chat_ids)
        _insert(connection, facts)


def replay(connection: Connection, after: str) -> tuple[int, str | None]:
    """Rebuild the next unassigned turns after this chat id.

    Returns the number of ledger rows read, and the last chat id, or None if there are no more.
    """
    facts = select_unassigned(connection, after, PAGE)
    last = None if len(facts) < PAGE else next(reversed(facts))
    rows.delete_unassigned_between(connection, after, last)
    _insert(connection, facts)
    return sum(map(len, facts.values())), last


def _insert(connection: Connection, facts: Mapping[str, Sequence[Fact]]) -> None:
    assigned = {chat_id for _, chat_id in rows.select_sessions_of_chats(connection, facts)}
    rows.upsert_turns(
        connection,
        {
            (UNASSIGNED, chat_id): fold(own)
            for chat_id, own in sorted(facts.items())
            if own and chat_id not in assigned
        },
    )
