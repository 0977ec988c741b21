"""Find the targets of an erasure, sessions and turns, by id or variable."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver.archive import UNASSIGNED
from archiver.archive.outbox import Change
from archiver.database import as_json


class Target(msgspec.Struct, frozen=True, order=True, gc=False):
    """A turn, or a whole session (`chat_id` empty). `session_id` is empty for unassigned turns."""

    session_id: str
    chat_id: str = ""

    @classmethod
    def unassigned(cls, chat_id: str) -> Self:
        """Return the unassigned turn of this chat."""
        return cls(UNASSIGNED, chat_id)

    @property
    def is_unassigned(self) -> bool:
        """Return whether the target is an unassigned turn."""
        return self.session_id == UNASSIGNED


def erased_change(target: Target) -> Change:
    """Return the change that announces the erasure of this target."""
    if target.chat_id:
        return Change("chat.erased", target.session_id, target.chat_id)
    return Change("session.erased", target.session_id)


def split(targets: Iterable[Target]) -> tuple[list[str], list[str]]:
    """Return the session ids of the targets, and the chat ids of the unassigned turns among them."""
    sessions, chats = set[str](), set[str]()
    for each in targets:
        if each.is_unassigned:
            chats.add(each.chat_id)
        else:
            sessions.add(each.session_id)
    return sorted(sessions), sorted(chats)


def parts(targets: Sequence[Target], limit: int) -> Iterator[Sequence[Target]]:
    """Yield the targets in order, at most `limit` at a time."""
    for start in range(0, len(targets), limit):
        yield targets[start : start + limit]


# The archive lacks turns that only events of unknown types mention. An index of the ledger on only the chat id would
# slow down every insert, so this reads the whole ledger, or its whole index on session and chat.
_SELECT_SESSIONS_OF_CHATS = text(
    """
    WITH requested AS MATERIALIZED (SELECT json_array_elements_text(:chat_ids) AS chat_id)
    SELECT c.session_id, c.chat_id FROM archiver.chats c
     WHERE c.session_id <> '' AND c.chat_id IN (SELECT chat_id FROM requested)
    UNION
    SELECT e.session_id, e.chat_id FROM archiver.events e
     WHERE e.session_id <> '' AND e.chat_id IN (SELECT chat_id FROM requested)
    """
)


def of_chats(connection: Connection, chat_ids: Sequence[str]) -> set[Target]:
    """Return the targets of these chats: a turn in each session that contains the chat, and an unassigned turn.

    Reads the whole ledger, so call it once for all chats.
    """
    rows = connection.execute(_SELECT_SESSIONS_OF_CHATS, {"chat_ids": as_json(chat_ids)})
    return {Target(row.session_id, row.chat_id) for row in rows} | {*map(Target.unassigned, chat_ids)}


_SELECT_BY_VARIABLE = text(
    """
    SELECT DISTINCT c.session_id, CASE WHEN c.session_id = '' THEN c.chat_id ELSE '' END AS chat_id
      FROM archiver.chats c WHERE c.variables ->> CAST(:variable AS text) = CAST(:value AS text)
    """
)


def of_variable(connection: Connection, variable: str, value: str) -> set[Target]:
    """Return sessions with a turn that has this variable value, and matching unassigned turns."""
    rows = connection.execute(_SELECT_BY_VARIABLE, {"variable": variable, "value": value})
    return {Target(row.session_id, row.chat_id) for row in rows}


# Unassigned facts are stored separately in the ledger, although their turns belong to these sessions.
_SELECT_UNASSIGNED = text(
    """
    WITH requested AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    ), chats AS MATERIALIZED (
        SELECT DISTINCT e.chat_id FROM requested JOIN archiver.events e ON e.session_id = requested.session_id
         WHERE requested.session_id <> '' AND e.chat_id IS NOT NULL AND requested.chat_id IN ('', e.chat_id)
    )
    SELECT DISTINCT c.chat_id FROM chats c JOIN archiver.events e ON e.session_id = '' AND e.chat_id = c.chat_id
    """
)


def with_unassigned(connection: Connection, targets: Sequence[Target]) -> list[Target]:
    """Return the targets, and the unassigned turns whose facts belong to them, in order."""
    unassigned = connection.scalars(_SELECT_UNASSIGNED, {"targets": as_json(targets)})
    return sorted({*targets, *map(Target.unassigned, unassigned)})


_COUNT = text(
    """
    WITH requested AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    )
    SELECT (SELECT count(DISTINCT t.session_id) FROM requested t JOIN archiver.sessions s ON s.session_id =
    t.session_id
             WHERE t.session_id <> '' AND t.chat_id = '') AS sessions,
           (SELECT count(DISTINCT (c.session_id, c.chat_id)) FROM requested t JOIN archiver.chats c
                ON c.session_id = t.session_id AND t.chat_id IN ('', c.chat_id) AND c.chat_id <> E'\\x1f') AS turns,
           (SELECT count(DISTINCT (m.session_id, m.chat_id, m.ordinal)) FROM requested t JOIN archiver.messages m
                ON m.session_id = t.session_id AND t.chat_id IN ('', m.chat_id)) AS messages,
           (SELECT count(DISTINCT e.id) FROM requested t JOIN archiver.events e
                ON e.session_id = t.session_id AND t.chat_id IN ('', e.chat_id)
             WHERE e.salt IS NOT NULL) AS events
    """
)


class Counts(msgspec.Struct):
    """The numbers of items to erase; `unsearchable`: quarantine rows that could not be searched."""

    sessions: int = 0
    turns: int = 0
    messages: int = 0
    events: int = 0
    quarantined: int = 0
    unsearchable: int = 0

    def without(self, subtracted: "Counts") -> "Counts":
        """Return these counts minus the others, but none below 0."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(subtracted), strict=True)
        return Counts(*(max(mine - other_counts, 0) for mine, other_counts in pairs))


def count(connection: Connection, targets: Sequence[Target]) -> Counts:
    """Return the numbers of rows in archive and ledger; the caller sets `quarantined` and `unsearchable`."""
    row = connection.execute(_COUNT, {"targets": as_json(targets)}).one()
    return Counts(*row)


_SELECT_UNKNOWN = text(
    """
    SELECT t.session_id, t.chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
     WHERE NOT EXISTS (SELECT FROM archiver.events e
                        WHERE e.session_id = t.session_id AND t.chat_id IN ('', e.chat_id))
       AND NOT EXISTS (SELECT FROM archiver.chats c
                        WHERE c.session_id = t.session_id AND t.chat_id IN ('', c.chat_id))
       AND NOT EXISTS (SELECT FROM archiver.erasures x
                        WHERE x.session_id = t.session_id AND x.chat_id = t.chat_id)
    """
)


def select_unknown(connection: Connection, targets: Sequence[Target]) -> list[Target]:
    """Return the targets that are neither archived nor erased, except turns that another target makes known."""
    rows = {Target(*row) for row in connection.execute(_SELECT_UNKNOWN, {"targets": as_json(targets)})}
    known = {each.chat_id for each in targets if each not in rows and each.chat_id}
    return sorted(each for each in rows if each.chat_id not in known)


_HAS_VARIABLE = text("SELECT EXISTS (SELECT FROM archiver.chats c WHERE jsonb_exists(c.variables, :variable))")


def has_variable(connection: Connection, variable: str) -> bool:
    """Return whether any turn has this variable. Reads all turns if none has."""
    return bool(connection.scalar(_HAS_VARIABLE, {"variable": variable}))


# Internal ids begin with U+001F: turns and greetings known only from a history.
_SELECT_UNCLAIMED = text(
    """
    WITH requested AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    )
    SELECT DISTINCT t.session_id FROM requested t
     WHERE t.session_id <> '' AND t.chat_id <> ''
       AND NOT EXISTS (SELECT FROM requested w WHERE w.session_id = t.session_id AND w.chat_id = '')
       AND NOT EXISTS (SELECT FROM archiver.messages m WHERE m.session_id = t.session_id AND m.chat_id = t.chat_id)
       AND EXISTS (SELECT FROM archiver.messages m WHERE m.session_id = t.session_id AND m.chat_id LIKE E'\\x1f%')
     ORDER BY 1
    """
)


def select_unclaimed(connection: Connection, targets: Sequence[Target]) -> list[str]:
    """Return sessions with history messages that may belong to a target but match no known turn.

    This is the case if no webhook delivered the text of the turn, and a history has messages that match no known
    turn.
    """
    return list(connection.scalars(_SELECT_UNCLAIMED, {"targets": as_json(targets)}))


_SELECT_CHATS = text(
    """
    SELECT DISTINCT e.chat_id FROM archiver.events e
     WHERE e.session_id IN (SELECT json_array_elements_text(:session_ids)) AND e.chat_id IS NOT NULL
    """
)


def marks(connection: Connection, targets: Iterable[Target]) -> set[str]:
    """Return the ids by which a quarantined body may mention the targets."""
    whole = sorted({each.session_id for each in targets if not each.chat_id})
    chats = connection.scalars(_SELECT_CHATS, {"session_ids": as_json(whole)})
    return {*whole, *chats, *(each.chat_id for each in targets if each.chat_id)} - {""}


_SELECT_ERASURES = text(
    """
    SELECT e.id, e.session_id, e.chat_id, e.erased_at, e.rule, a.reason, a.actor
      FROM archiver.erasures e LEFT JOIN archiver.acts a ON a.id = e.act_id
     WHERE e.id > :after ORDER BY e.id LIMIT :most
    """
)


def select_erasures(connection: Connection, after: int, limit: int) -> Sequence[RowMapping]:
    """Return at most `limit` erasures after this id, oldest first.

    The rows contain time, rule, reason and actor, but no content.
    """
    parameters: dict[str, Any] = {"after": after, "most": limit}
    return connection.execute(_SELECT_ERASURES, parameters).mappings().all()
