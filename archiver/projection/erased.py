"""What was erased and does not come back, as the ledger and the archive look it up; `erasure` orders it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, text

from archiver.database import Direct, Statement, execute


class Told(NamedTuple):
    """Whose a fact is: its session, empty where it does not tell, and its chat if it speaks of one."""

    session_id: str
    chat_id: str | None


class Erased(msgspec.Struct, frozen=True, gc=False):
    """What was erased of what a fact speaks of: all of it (`is_whole`), or at least some turn of its session."""

    is_whole: bool
    # Its chat was erased before anybody told that it is one of this session.
    is_found: bool = False


# As JSON, because the driver writes an array item by item. A chat that does not tell its session is erased, too,
# where a session that holds it was, or that turn of it.
_SELECT_ERASED = Direct(
    """
    WITH told AS MATERIALIZED (
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
          FROM told t
    )
    SELECT session_id, chat_id, is_chat OR is_session OR is_anywhere OR is_at_home AS is_whole,
           session_id <> '' AND is_anywhere AND NOT is_chat AND NOT is_session AS is_found
      FROM known WHERE is_touched OR is_chat OR is_anywhere OR is_at_home
    """
)


def select_erased(connection: Connection, told: Iterable[Told], first: Sequence[Statement]) -> dict[Told, Erased]:
    """Of these, those of which something was erased. Exact where the statements `first` take the ledger's lock."""
    asked = [{"session_id": each.session_id, "chat_id": each.chat_id} for each in sorted(set(told), key=_order)]
    *_, found = execute(connection, *first, _SELECT_ERASED.bind(msgspec.json.encode(asked).decode()))
    return {Told(row.session_id, row.chat_id): Erased(row.is_whole, row.is_found) for row in found}


def _order(told: Told) -> tuple[str, str]:
    return told.session_id, told.chat_id or ""


# Under the same act: once it is told whose turn it was, that session's history is not to bring it back.
_EXTEND = text(
    """
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT CAST(:session_id AS text), chat_id, erased_at, rule, act_id
      FROM archiver.erasures WHERE session_id = '' AND chat_id = :chat_id
    ON CONFLICT DO NOTHING
    """
)


def extend_erasure(connection: Connection, session_id: str, chat_id: str) -> None:
    """Note that a chat, erased when nobody had told its session, is one of this session."""
    connection.execute(_EXTEND, {"session_id": session_id, "chat_id": chat_id})


# A fact that was refused told that these, which did not tell their session, are of an erased one: under the same act
# they are erased with the next sweep, unless they are held themselves.
_NOTE_STRAYS = text(
    """
    WITH told AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM json_to_recordset(:told) AS t (session_id text, chat_id text)
    )
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT t.session_id, t.chat_id, e.erased_at, e.rule, e.act_id
      FROM told t JOIN archiver.erasures e ON e.session_id = t.session_id AND e.chat_id = ''
     WHERE EXISTS (SELECT FROM archiver.events f
                    WHERE f.session_id = '' AND f.chat_id = t.chat_id AND f.body IS NOT NULL)
    ON CONFLICT DO NOTHING
    """
)


# And where nothing is known of such a turn, it is noted that nothing is to be, not even without its session.
_NOTE_UNKNOWN = text(
    """
    WITH told AS MATERIALIZED (
        SELECT DISTINCT session_id, chat_id FROM json_to_recordset(:told) AS t (session_id text, chat_id text)
    )
    INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)
    SELECT '', t.chat_id, e.erased_at, e.rule, e.act_id
      FROM told t JOIN archiver.erasures e ON e.session_id = t.session_id AND e.chat_id = ''
     WHERE NOT EXISTS (SELECT FROM archiver.chats c WHERE c.session_id = t.session_id AND c.chat_id = t.chat_id)
       AND NOT EXISTS (SELECT FROM archiver.events f WHERE f.session_id = '' AND f.chat_id = t.chat_id)
    ON CONFLICT DO NOTHING
    """
)


def note_refused(connection: Connection, refused: Iterable[Told]) -> None:
    """Note what refused facts told of turns of erased sessions, so that facts without one are known as theirs."""
    told = sorted({each for each in refused if each.session_id and each.chat_id}, key=_order)
    if told:
        asked = [{"session_id": each.session_id, "chat_id": each.chat_id} for each in told]
        for statement in (_NOTE_STRAYS, _NOTE_UNKNOWN):
            connection.execute(statement, {"told": msgspec.json.encode(asked).decode()})


_SELECT_SESSIONS = text(
    """
    SELECT DISTINCT e.session_id FROM archiver.erasures e
     WHERE e.session_id IN (SELECT json_array_elements_text(:session_ids))
    """
)


def select_erased_sessions(connection: Connection, session_ids: Sequence[str]) -> list[str]:
    """Those of these sessions that were erased, or some of their turns."""
    if not session_ids:
        return []
    return list(connection.scalars(_SELECT_SESSIONS, {"session_ids": msgspec.json.encode(session_ids).decode()}))
