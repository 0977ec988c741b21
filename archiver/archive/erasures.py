"""Look up erasures for incoming facts, and extend them to newly assigned chats; `compliance.erasure` orders them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, text

from archiver.database import RawStatement, Statement, as_json, execute


class FactRef(NamedTuple):
    """Session (empty if unassigned) and chat of a fact."""

    session_id: str
    chat_id: str | None


class Erased(msgspec.Struct, frozen=True, gc=False):
    """An erasure that concerns a fact: of its whole subject (`is_whole`), or of a turn of its session."""

    is_whole: bool
    # Its chat was erased before its session was known.
    is_found: bool = False


# As JSON, because the driver writes an array item by item. An unassigned chat counts as erased
# if a session that contains it was erased, or its turn in that session.
_SELECT_ERASED = RawStatement(
    """
    WITH refs AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM json_to_recordset($1) AS t (session_id text, chat_id text)
         WHERE EXISTS (SELECT FROM archiver.erasures)
    ), known AS MATERIALIZED (
        SELECT t.session_id, t.chat_id,
               EXISTS (SELECT FROM archiver.erasures e
                        WHERE t.session_id <> '' AND e.session_id = t.session_id) AS is_touched,
               EXISTS (SELECT FROM archiver.erasures e
                        WHERE e.session_id = t.session_id AND e.chat_id = t.chat_id) AS is_chat,
               EXISTS (SELECT FROM archiver.erasures e
                        WHERE t.session_id <> '' AND e.session_id = t.session_id AND e.chat_id = '') AS is_session,
               EXISTS (SELECT FROM archiver.erasures e
                        WHERE e.session_id = '' AND e.chat_id = t.chat_id) AS is_anywhere,
               EXISTS (SELECT FROM archiver.chats c JOIN archiver.erasures e ON e.session_id = c.session_id
                        WHERE t.session_id = '' AND c.chat_id = t.chat_id AND c.session_id <> ''
                          AND e.chat_id IN ('', t.chat_id)) AS is_at_home
          FROM refs t
    )
    SELECT session_id, chat_id, is_chat OR is_session OR is_anywhere OR is_at_home AS is_whole,
           session_id <> '' AND is_anywhere AND NOT is_chat AND NOT is_session AS is_found
      FROM known WHERE is_touched OR is_chat OR is_anywhere OR is_at_home
    """
)


def select_erased(
    connection: Connection, refs: Iterable[FactRef], first: Sequence[Statement]
) -> dict[FactRef, Erased]:
    """Return the erasures that concern these facts. Exact if the statements `first` acquire the recording lock."""
    rows_json = [{"session_id": each.session_id, "chat_id": each.chat_id} for each in sorted(set(refs), key=_order)]
    *_, item = execute(connection, *first, _SELECT_ERASED.bind(as_json(rows_json)))
    return {FactRef(row.session_id, row.chat_id): Erased(row.is_whole, row.is_found) for row in item}


def _order(ref: FactRef) -> tuple[str, str]:
    return ref.session_id, ref.chat_id or ""


# Under the same audit entry: once the session is known, its history must not restore the turn.
_EXTEND = text(
    """
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT CAST(:session_id AS text), chat_id, erased_at, rule, act_id
      FROM archiver.erasures WHERE session_id = '' AND chat_id = :chat_id
    ON CONFLICT DO NOTHING
    """
)


def extend_erasure(connection: Connection, session_id: str, chat_id: str) -> None:
    """Record that an erased unassigned chat belongs to this session."""
    connection.execute(_EXTEND, {"session_id": session_id, "chat_id": chat_id})


# A refused fact showed that these unassigned facts belong to an erased session: under the same audit entry
# they are erased with the next sweep, unless they are under a legal hold themselves.
_NOTE_UNASSIGNED = text(
    """
    WITH refs AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM json_to_recordset(:refs) AS t (session_id text, chat_id text)
    )
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT t.session_id, t.chat_id, e.erased_at, e.rule, e.act_id
      FROM refs t JOIN archiver.erasures e ON e.session_id = t.session_id AND e.chat_id = ''
     WHERE EXISTS (SELECT FROM archiver.events f
                    WHERE f.session_id = '' AND f.chat_id = t.chat_id AND f.body IS NOT NULL)
    ON CONFLICT DO NOTHING
    """
)


# If nothing is known of such a turn, its erasure is also recorded without the session, so that no fact restores it.
_NOTE_UNKNOWN = text(
    """
    WITH refs AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM json_to_recordset(:refs) AS t (session_id text, chat_id text)
    )
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT '', t.chat_id, e.erased_at, e.rule, e.act_id
      FROM refs t JOIN archiver.erasures e ON e.session_id = t.session_id AND e.chat_id = ''
     WHERE NOT EXISTS (SELECT FROM archiver.chats c WHERE c.session_id = t.session_id AND c.chat_id = t.chat_id)
       AND NOT EXISTS (SELECT FROM archiver.events f WHERE f.session_id = '' AND f.chat_id = t.chat_id)
    ON CONFLICT DO NOTHING
    """
)


def note_refused(connection: Connection, refused: Iterable[FactRef]) -> None:
    """Extend the erasures of refused facts, so that unassigned facts of the same chats are erased too."""
    refs = sorted({each for each in refused if each.session_id and each.chat_id}, key=_order)
    if refs:
        rows_json = [{"session_id": each.session_id, "chat_id": each.chat_id} for each in refs]
        for statement in (_NOTE_UNASSIGNED, _NOTE_UNKNOWN):
            connection.execute(statement, {"refs": as_json(rows_json)})


_SELECT_SESSIONS = text(
    """
    SELECT DISTINCT e.session_id FROM archiver.erasures e
     WHERE e.session_id = ANY (ARRAY(SELECT json_array_elements_text(:session_ids)))
    """
)


def select_erased_sessions(connection: Connection, session_ids: Sequence[str]) -> list[str]:
    """Return the sessions among these that were erased completely or in part."""
    if not session_ids:
        return []
    return list(connection.scalars(_SELECT_SESSIONS, {"session_ids": as_json(session_ids)}))
