"""What is to be erased: whole sessions and single turns, found by what people know of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver.projection import UNPLACED


class Target(msgspec.Struct, frozen=True, order=True, gc=False):
    """A turn, or a whole session (`chat_id` empty). `session_id` is empty for facts that do not tell theirs."""

    session_id: str
    chat_id: str = ""


def parts(targets: Sequence[Target], most: int) -> Iterator[Sequence[Target]]:
    """In their order, so many at a time."""
    for start in range(0, len(targets), most):
        yield targets[start : start + most]


def as_json(targets: Iterable[Target]) -> str:
    """For `json_to_recordset`: the driver writes an array item by item."""
    return msgspec.json.encode(list(targets)).decode()


# The archive knows nothing of a turn that only events of unknown types tell of. The ledger has no index by chats
# alone, which each event would pay for: so all of it is read, or of its index by session and chat.
_SELECT_HOMES = text(
    """
    WITH told AS MATERIALIZED (SELECT json_array_elements_text(:chat_ids) AS chat_id)
    SELECT c.session_id, c.chat_id FROM archiver.chats c
     WHERE c.session_id <> '' AND c.chat_id IN (SELECT chat_id FROM told)
    UNION
    SELECT e.session_id, e.chat_id FROM archiver.events e
     WHERE e.session_id <> '' AND e.chat_id IN (SELECT chat_id FROM told)
    """
)


def of_chats(connection: Connection, chat_ids: Sequence[str]) -> set[Target]:
    """These chats wherever they are: in each session that holds them, and where no delivery tells one.

    Reads the ledger from end to end, so call it once.
    """
    homes = connection.execute(_SELECT_HOMES, {"chat_ids": msgspec.json.encode(chat_ids).decode()})
    return {Target(row.session_id, row.chat_id) for row in homes} | {Target(UNPLACED, each) for each in chat_ids}


_SELECT_BY_VARIABLE = text(
    """
    SELECT DISTINCT c.session_id, CASE WHEN c.session_id = '' THEN c.chat_id ELSE '' END AS chat_id
      FROM archiver.chats c WHERE c.variables ->> CAST(:variable AS text) = CAST(:value AS text)
    """
)


def of_variable(connection: Connection, variable: str, value: str) -> set[Target]:
    """The sessions of which any turn has this variable at this value, and such turns that stand without a session."""
    found = connection.execute(_SELECT_BY_VARIABLE, {"variable": variable, "value": value})
    return {Target(row.session_id, row.chat_id) for row in found}


# Facts that did not tell their session stand apart in the ledger, though their turns are these sessions'.
_SELECT_STRAYS = text(
    """
    WITH told AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    ), chats AS MATERIALIZED (
        SELECT DISTINCT e.chat_id FROM told JOIN archiver.events e ON e.session_id = told.session_id
         WHERE told.session_id <> '' AND e.chat_id IS NOT NULL AND told.chat_id IN ('', e.chat_id)
    )
    SELECT DISTINCT c.chat_id FROM chats c JOIN archiver.events e ON e.session_id = '' AND e.chat_id = c.chat_id
    """
)


def with_strays(connection: Connection, targets: Sequence[Target]) -> list[Target]:
    """These and, of their turns, the facts that did not tell their session, in order."""
    strays = connection.scalars(_SELECT_STRAYS, {"targets": as_json(targets)})
    return sorted({*targets, *(Target(UNPLACED, chat_id) for chat_id in strays)})


_COUNT = text(
    """
    WITH told AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    )
    SELECT (SELECT count(DISTINCT t.session_id) FROM told t JOIN archiver.sessions s ON s.session_id = t.session_id
             WHERE t.session_id <> '' AND t.chat_id = '') AS sessions,
           (SELECT count(DISTINCT (c.session_id, c.chat_id)) FROM told t JOIN archiver.chats c
                ON c.session_id = t.session_id AND t.chat_id IN ('', c.chat_id)) AS turns,
           (SELECT count(DISTINCT (m.session_id, m.chat_id, m.ordinal)) FROM told t JOIN archiver.messages m
                ON m.session_id = t.session_id AND t.chat_id IN ('', m.chat_id)) AS messages,
           (SELECT count(DISTINCT e.id) FROM told t JOIN archiver.events e
                ON e.session_id = t.session_id AND t.chat_id IN ('', e.chat_id)
             WHERE e.salt IS NOT NULL) AS events
    """
)


class Counts(msgspec.Struct):
    """How much there is to erase; `unsearchable`: rows of the quarantine that could not be searched for it."""

    sessions: int = 0
    turns: int = 0
    messages: int = 0
    events: int = 0
    quarantined: int = 0
    unsearchable: int = 0

    def without(self, others: "Counts") -> "Counts":
        """What is left once these are taken out."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(others), strict=True)
        return Counts(*(max(mine - theirs, 0) for mine, theirs in pairs))


def count(connection: Connection, targets: Sequence[Target]) -> Counts:
    """What archive and ledger hold of these; `quarantined` and `unsearchable` are for the caller to say."""
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
    """Those of which nothing is known, nor that they were erased; a turn only if it is unknown in all of these."""
    found = {Target(*row) for row in connection.execute(_SELECT_UNKNOWN, {"targets": as_json(targets)})}
    known = {each.chat_id for each in targets if each not in found and each.chat_id}
    return sorted(each for each in found if each.chat_id not in known)


_HAS_VARIABLE = text("SELECT EXISTS (SELECT FROM archiver.chats c WHERE jsonb_exists(c.variables, :variable))")


def has_variable(connection: Connection, variable: str) -> bool:
    """Whether any turn has this variable, at whatever value. Reads all of them where none has."""
    return bool(connection.scalar(_HAS_VARIABLE, {"variable": variable}))


# Ids of our own begin with U+001F: turns and greetings that only history tells of.
_SELECT_UNCLAIMED = text(
    """
    WITH told AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    )
    SELECT DISTINCT t.session_id FROM told t
     WHERE t.session_id <> '' AND t.chat_id <> ''
       AND NOT EXISTS (SELECT FROM told w WHERE w.session_id = t.session_id AND w.chat_id = '')
       AND NOT EXISTS (SELECT FROM archiver.messages m WHERE m.session_id = t.session_id AND m.chat_id = t.chat_id)
       AND EXISTS (SELECT FROM archiver.messages m WHERE m.session_id = t.session_id AND m.chat_id LIKE E'\\x1f%')
     ORDER BY 1
    """
)


def select_unclaimed(connection: Connection, targets: Sequence[Target]) -> list[str]:
    """The sessions in which a turn's words may stand unclaimed.

    No webhook ever told what the turn said, and a history tells words of which nobody knows whose they are.
    """
    return list(connection.scalars(_SELECT_UNCLAIMED, {"targets": as_json(targets)}))


_SELECT_CHATS = text(
    """
    SELECT DISTINCT e.chat_id FROM archiver.events e
     WHERE e.session_id IN (SELECT json_array_elements_text(:session_ids)) AND e.chat_id IS NOT NULL
    """
)


def marks(connection: Connection, targets: Iterable[Target]) -> set[str]:
    """The ids by which bytes that nobody could read may tell that they are about these."""
    whole = sorted({each.session_id for each in targets if not each.chat_id})
    chats = connection.scalars(_SELECT_CHATS, {"session_ids": msgspec.json.encode(whole).decode()})
    return {*whole, *chats, *(each.chat_id for each in targets if each.chat_id)} - {""}


_SELECT_ERASURES = text(
    """
    SELECT e.id, e.session_id, e.chat_id, e.erased_at, e.rule, a.reason, a.actor
      FROM archiver.erasures e LEFT JOIN archiver.acts a ON a.id = e.act_id
     WHERE e.id > :after ORDER BY e.id LIMIT :most
    """
)


def select_erasures(connection: Connection, after: int, most: int) -> Sequence[RowMapping]:
    """What was erased, when, under which rule, why and by whom, oldest first; no content."""
    parameters: dict[str, Any] = {"after": after, "most": most}
    return connection.execute(_SELECT_ERASURES, parameters).mappings().all()
