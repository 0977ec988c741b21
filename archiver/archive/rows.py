"""Write the rows of sessions, chats and messages; the only writer of these tables."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import msgspec
from sqlalchemy import (
    Connection,
    Table,
    and_,
    bindparam,
    column,
    delete,
    func,
    literal_column,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, TEXT, insert

from archiver.archive import coverage
from archiver.archive.coverage import Timing
from archiver.archive.differences import (
    COVERAGE,
    MessageText,
    TurnState,
    message_text,
    reassigned_turn_state,
    turn_state,
)
from archiver.archive.facts import UNASSIGNED, Key
from archiver.archive.outbox import REWRITTEN, Change
from archiver.archive.sessions import Rows, chat_row
from archiver.archive.turns import Turn
from archiver.database import BulkInsert, Statement, as_json, defer, execute, tables

Row = dict[str, Any]

_CHAT_IDS = bindparam("chat_ids", type_=ARRAY(TEXT))
_SESSION_IDS = bindparam("session_ids", type_=ARRAY(TEXT))


def select_sessions_of_chats(connection: Connection, chat_ids: Collection[str]) -> list[Key]:
    """Return the sessions known to contain these chats, each with the chat."""
    if not chat_ids:
        return []
    chats = tables.chats.c
    statement = select(chats.session_id, chats.chat_id).where(
        chats.chat_id == func.any(_CHAT_IDS), chats.session_id != UNASSIGNED
    )
    return [(row.session_id, row.chat_id) for row in connection.execute(statement, {"chat_ids": sorted(chat_ids)})]


@cache
def _session_upsert(after_read_by: timedelta) -> BulkInsert:
    """Return an upsert of sessions. `after_read_by`: how long after `read_by` a session may wait for a quiet time."""
    sessions = tables.sessions
    statement = insert(sessions)
    new = statement.excluded
    read_by = func.least(sessions.c.read_by, new.read_by)
    last_event_at = func.greatest(sessions.c.last_event_at, new.last_event_at)
    changes = {
        "first_event_at": func.least(sessions.c.first_event_at, new.first_event_at),
        "last_event_at": last_event_at,
        "read_by": read_by,
        # The same rule as in `Timing.due_after`; a test compares the two.
        "reconcile_at": func.least(
            func.greatest(sessions.c.reconcile_at, new.reconcile_at),
            func.greatest(read_by + literal_column(f"interval '{after_read_by.total_seconds()} s'"), last_event_at),
        ),
    }
    upsert = statement.on_conflict_do_update(index_elements=[sessions.c.session_id], set_=changes)
    return BulkInsert(upsert.returning(sessions.c.session_id, sessions.c.read_at), ["session_id", *changes])


def upsert_sessions(
    connection: Connection, arrivals: Mapping[str, Sequence[datetime]], timing: Timing, then: Statement | None = None
) -> tuple[set[str], list[Any]]:
    """Lock these sessions in order of id and record arrivals; return those that were read.

    Also return the rows of the statement `then`, which runs under the same locks in the same round trip.
    """
    new = []
    for session_id in sorted(arrivals):
        first, last = min(arrivals[session_id]), max(arrivals[session_id])
        read_by = timing.read_by(first)
        new.append(
            {
                "session_id": session_id,
                "first_event_at": first,
                "last_event_at": last,
                "read_by": read_by,
                "reconcile_at": timing.due_after(last, read_by),
            }
        )
    upserts = [*_session_upsert(timing.margin - timing.wait).bind(new)]
    answers = execute(connection, *upserts, *([then] if then else []))
    row_statement = answers.pop() if then else []
    return {row.session_id for answered in answers for row in answered if row.read_at is not None}, row_statement


def _upsert(table: Table, keys: Sequence[str], unset: Sequence[str] = ()) -> BulkInsert:
    """Return an upsert that sets every column except the key."""
    statement = insert(table)
    columns = [column.name for column in table.c if column.name not in unset]
    changes = {name: statement.excluded[name] for name in columns if name not in keys}
    return BulkInsert(statement.on_conflict_do_update(index_elements=list(keys), set_=changes), columns)


_CHAT_KEY = ("session_id", "chat_id")
_MESSAGE_KEY = ("session_id", "chat_id", "ordinal")
_UPSERT_CHAT = _upsert(tables.chats, _CHAT_KEY)
_UPSERT_DELIVERED_CHAT = _upsert(tables.chats, _CHAT_KEY, unset=("began_at",))
_UPSERT_MESSAGE = _upsert(tables.messages, _MESSAGE_KEY)
_UPSERT_UNREAD_MESSAGE = _upsert(tables.messages, _MESSAGE_KEY, unset=("place", "in_history", "history_content"))
_UPSERT_WHOLE_SESSION = _upsert(tables.sessions, ("session_id",))


def upsert_turns(connection: Connection, turns: Mapping[Key, Turn]) -> None:
    """Write turns, with their messages, of sessions that were never read."""
    chats = _UPSERT_DELIVERED_CHAT.bind([chat_row(*key, turn) for key, turn in turns.items()])
    messages = [
        {
            "session_id": session_id,
            "chat_id": chat_id,
            "ordinal": ordinal,
            "role": message.role,
            "content": message.content,
            "content_kind": message.kind,
            "source": turn.source,
        }
        for (session_id, chat_id), turn in turns.items()
        for ordinal, message in enumerate(turn.messages)
    ]
    defer(connection, *chats, *_UPSERT_UNREAD_MESSAGE.bind(messages))


def upsert_transcript_turns(connection: Connection, turns: Mapping[Key, Turn], lines: Sequence[Row]) -> None:
    """Write turns, with these messages, of sessions that were read."""
    chats = _UPSERT_DELIVERED_CHAT.bind([chat_row(*key, turn) for key, turn in turns.items()])
    defer(connection, *chats, *_UPSERT_MESSAGE.bind(lines))


# The keys are in a materialized CTE because a distributed table cannot be joined to anything else. OFFSET 0: see
# `facts`.
_SELECT_TURNS = text(
    f"""
    WITH keys AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:keys) AS k (session_id text, chat_id text)
    )
    SELECT {", ".join(f"c.{each.name}" for each in tables.chats.c)}, m.role, m.content, m.history_content
      FROM keys
     CROSS JOIN LATERAL (
         SELECT * FROM archiver.chats c WHERE c.session_id = keys.session_id AND c.chat_id = keys.chat_id OFFSET 0
     ) c
      LEFT JOIN LATERAL (
         SELECT * FROM archiver.messages m WHERE m.session_id = keys.session_id AND m.chat_id = keys.chat_id OFFSET 0
     ) m ON true
     ORDER BY m.ordinal
    """  # noqa: S608  # only constant names are inserted, never input
).columns(*tables.chats.c, column("role", TEXT), column("content", TEXT), column("history_content", TEXT))


def select_turn_states(connection: Connection, keys: Sequence[Key]) -> dict[Key, TurnState]:
    """Return the published states of the turns that are archived."""
    rows_json = [{"session_id": session_id, "chat_id": chat_id} for session_id, chat_id in keys]
    chats: dict[Key, Row] = {}
    texts: dict[Key, list[MessageText]] = defaultdict(list)
    for row in connection.execute(_SELECT_TURNS, {"keys": as_json(rows_json)}).mappings():
        key = row["session_id"], row["chat_id"]
        chats[key] = dict(row)
        texts[key] += [message_text(chats[key])] if row["role"] is not None else []
    return {key: turn_state(row, texts[key]) for key, row in chats.items()}


_DELETE_SURPLUS = delete(tables.messages).where(
    and_(
        tables.messages.c.session_id == bindparam("of_session"),
        tables.messages.c.chat_id == bindparam("of_chat"),
        tables.messages.c.ordinal >= bindparam("kept"),
    )
)


def delete_surplus_messages(connection: Connection, counts: Mapping[Key, int]) -> None:
    """Delete messages beyond the new number, because a newer revision may have fewer messages."""
    if counts:
        connection.execute(
            _DELETE_SURPLUS,
            [{"of_session": key[0], "of_chat": key[1], "kept": count} for key, count in sorted(counts.items())],
        )


def delete_unassigned(connection: Connection, chat_ids: Sequence[str]) -> dict[str, TurnState]:
    """Delete the unassigned turns of these chats; return their states by chat id."""
    if not chat_ids:
        return {}
    unassigned = {"chat_ids": list(chat_ids)}
    connection.execute(_DELETE_UNASSIGNED_MESSAGES, unassigned)
    deleted = connection.execute(_DELETE_UNASSIGNED_CHATS, unassigned)
    return {row.chat_id: reassigned_turn_state(is_deleted=row.deleted_at is not None) for row in deleted}


_DELETE_UNASSIGNED_MESSAGES, _delete_unassigned_chats = (
    delete(table).where(table.c.session_id == UNASSIGNED, table.c.chat_id == func.any(_CHAT_IDS))
    for table in (tables.messages, tables.chats)
)
_DELETE_UNASSIGNED_CHATS = _delete_unassigned_chats.returning(tables.chats.c.chat_id, tables.chats.c.deleted_at)


_DELETE_UNASSIGNED_BETWEEN = [
    delete(table).where(
        table.c.session_id == UNASSIGNED,
        table.c.chat_id > bindparam("after"),
        or_(bindparam("last", type_=TEXT).is_(None), table.c.chat_id <= bindparam("last", type_=TEXT)),
    )
    for table in (tables.messages, tables.chats)
]


def delete_unassigned_between(connection: Connection, after: str, last: str | None) -> None:
    """Delete the unassigned turns with chat ids after `after`, up to `last`; None deletes all later ones."""
    for statement in _DELETE_UNASSIGNED_BETWEEN:
        connection.execute(statement, {"after": after, "last": last})


def lock_sessions(connection: Connection, session_ids: Sequence[str]) -> None:
    """Lock these sessions, so that no other transaction projects their turns until this transaction ends."""
    if session_ids:
        # Not FOR UPDATE, which a distributed table does not support across sessions.
        touched = update(tables.sessions).where(tables.sessions.c.session_id == func.any(_SESSION_IDS))
        connection.execute(touched.values(read_by=tables.sessions.c.read_by), {"session_ids": list(session_ids)})


def mark_erased(connection: Connection, session_ids: Sequence[str]) -> list[Change]:
    """Set the status that `derive` returns for an erased session: unverified, and never due. Return the changes."""
    if not session_ids:
        return []
    sessions, ids = tables.sessions, {"session_ids": list(session_ids)}
    among = sessions.c.session_id == func.any(_SESSION_IDS)
    before = connection.execute(select(sessions.c.session_id, sessions.c.reason).where(among), ids).all()
    values = {"coverage": "unverified", "reason": coverage.ERASED, "reconcile_at": None, "append_after": None}
    connection.execute(update(sessions).where(among).values(values), ids)
    # Of a session of which something was erased before, only the times of erasures change.
    return [Change(REWRITTEN if row.reason == coverage.ERASED else COVERAGE, row.session_id) for row in before]


def delete_sessions(connection: Connection, session_ids: Sequence[str]) -> None:
    """Delete these sessions, which have no facts, with all their rows."""
    for table in (tables.messages, tables.chats, tables.sessions) if session_ids else ():
        connection.execute(
            delete(table).where(table.c.session_id == func.any(_SESSION_IDS)), {"session_ids": list(session_ids)}
        )


class Archived(msgspec.Struct):
    """The archive rows of some sessions, by key."""

    sessions: dict[str, Row]
    chats: dict[Key, Row]
    messages: dict[tuple[str, str, int], Row]


def select_archived(connection: Connection, session_ids: Sequence[str]) -> Archived:
    """Return the rows of these sessions."""

    def rows_of(table: Table) -> Iterable[Row]:
        statement = select(table).where(table.c.session_id == func.any(_SESSION_IDS))
        return (dict(row) for row in connection.execute(statement, {"session_ids": list(session_ids)}).mappings())

    return Archived(
        sessions={row["session_id"]: row for row in rows_of(tables.sessions)},
        chats={(row["session_id"], row["chat_id"]): row for row in rows_of(tables.chats)},
        messages={(row["session_id"], row["chat_id"], row["ordinal"]): row for row in rows_of(tables.messages)},
    )


class Written(msgspec.Struct):
    """The increase in messages known only from history, and the sessions of which visible rows were written."""

    repaired: int
    sessions: set[str]


def write_difference(
    connection: Connection, archived: Archived, derived: Sequence[Rows], read: Collection[str]
) -> Written:
    """Update the archived rows to the derived ones; write only rows that differ.

    `read`: sessions of which a reading has just been recorded.
    """
    sessions: dict[str, Row] = {}
    for rows in derived:
        session_id = rows.session["session_id"]
        old = archived.sessions.get(session_id)
        preserved: Row = dict(_AT_REST) if old is None else {name: old[name] for name in _AT_REST}
        if session_id in read:
            preserved["failing_since"] = None
        sessions[session_id] = rows.session | preserved
    chats = {(row["session_id"], row["chat_id"]): row for rows in derived for row in rows.chats}
    messages = {(m["session_id"], m["chat_id"], m["ordinal"]): m for rows in derived for m in rows.messages}
    changed_sessions = _changed(sessions, archived.sessions)
    changed_chats, changed_messages = _changed(chats, archived.chats), _changed(messages, archived.messages)
    surplus_chats = [key for key in archived.chats.keys() - chats.keys() if key[0] in sessions]
    surplus_messages = [key for key in archived.messages.keys() - messages.keys() if key[0] in sessions]
    _UPSERT_WHOLE_SESSION.execute(connection, changed_sessions)
    _UPSERT_CHAT.execute(connection, changed_chats)
    _UPSERT_MESSAGE.execute(connection, changed_messages)
    _delete_keys(connection, tables.messages, _MESSAGE_KEY, surplus_messages)
    _delete_keys(connection, tables.chats, _CHAT_KEY, surplus_chats)
    visible = [row for row in changed_sessions if _is_visibly_changed(row, archived.sessions.get(row["session_id"]))]
    rewritten = {str(row["session_id"]) for row in (*visible, *changed_chats, *changed_messages)}
    rewritten |= {str(key[0]) for key in (*surplus_chats, *surplus_messages)}
    repaired = sum(
        max(0, row["repaired_messages"] - archived.sessions.get(key, _UNREPAIRED)["repaired_messages"])
        for key, row in sessions.items()
    )
    return Written(repaired, rewritten)


# Values of a session that views show, apart from its coverage and from the times of readings.
_VISIBLE = ("first_event_at", "name", "status", "assistant_id", "created_at")


def _is_visibly_changed(new: Row, old: Row | None) -> bool:
    return old is None or any(new[name] != old[name] for name in _VISIBLE)


_UNREPAIRED: Row = {"repaired_messages": 0}
# The state of a session's readings, which is stored nowhere else, not even in the ledger.
_AT_REST: Row = {"leased_until": None, "failing_since": None}


def _changed(new: Mapping[Any, Row], old: Mapping[Any, Row]) -> list[Row]:
    return [row for key, row in sorted(new.items()) if _differs(row, old.get(key))]


def _differs(new: Row, old: Row | None) -> bool:
    if old is None:
        return True
    # Postgres stores the keys of JSON in its own order.
    new = new | {"variables": msgspec.json.decode(new["variables"])} if new.get("variables") else new
    return any(old[name] != value for name, value in new.items())


def _delete_keys(connection: Connection, table: Table, names: Sequence[str], keys: Iterable[tuple[Any, ...]]) -> None:
    surplus = [dict(zip((f"of_{name}" for name in names), key, strict=True)) for key in sorted(keys)]
    if surplus:
        of_key = and_(*(table.c[name] == bindparam(f"of_{name}") for name in names))
        connection.execute(delete(table).where(of_key), surplus)
