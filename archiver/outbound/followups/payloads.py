"""Build the bodies of deliveries from the archive when they are sent; no content is stored (I8)."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, text

from archiver.archive import outbox
from archiver.archive.unassigned import current_sessions
from archiver.database import as_json
from archiver.outbound.followups.deliveries import Due

MAX_BYTES = 262_144  # per body; a larger one omits its messages, then its variables, then everything but ids

Data = dict[str, Any]
SelectSeal = Callable[[Connection, int], Data | None]  # returns a seal by id; seals belong to a higher layer


def select_bodies(connection: Connection, due: Sequence[Due], select_seal: SelectSeal) -> dict[int, bytes]:
    """Return the bodies of these deliveries by cursor."""
    turns = [each for each in due if each.chat_id is not None]
    sessions = [each for each in due if each.chat_id is None and each.seal_id is None]
    by_cursor = {
        **_select_turns(connection, turns),
        **_select_conversations(connection, sessions),
        **{
            each.cursor: {"cursor": each.cursor, "seal": select_seal(connection, each.seal_id)}
            for each in due
            if each.seal_id is not None
        },
    }
    return {each.cursor: encode(each.type, each.changed_at, _without_erased(each, by_cursor)) for each in due}


def _without_erased(change: Due, by_cursor: Mapping[int, Data]) -> Data:
    """Return the data of a change; for an erasure only its ids and time, even if a session still has the turn."""
    data = by_cursor[change.cursor]
    if change.type not in outbox.ERASURES:
        return data
    erased_at = data.get("erased_at", change.changed_at)
    return {name: data[name] for name in ("cursor", "session_id", "chat_id") if name in data} | {
        "erased_at": erased_at
    }


def encode(kind: str, at: datetime, data: Data) -> bytes:
    """Encode the body as JSON within the size limit; `truncated` marks omitted content."""
    body = _json(kind, at, data)
    for left_out in ("messages", "variables", "chat", "conversation"):
        if len(body) <= MAX_BYTES:
            break
        shorter = dict(data, truncated=True)
        if left_out == "messages":
            shorter.pop("messages", None)
        elif left_out == "variables" and isinstance(shorter.get("chat"), dict):
            shorter["chat"] = dict(shorter["chat"], variables=None)
        elif left_out in shorter:
            shorter[left_out] = None
        data = shorter
        body = _json(kind, at, data)
    return body


def _json(kind: str, at: datetime, data: Data) -> bytes:
    return _ENCODER.encode({"type": kind, "timestamp": at, "data": data})


_ENCODER = msgspec.json.Encoder(decimal_format="number")


_TURNS = f"""
    WITH sought AS MATERIALIZED (
        SELECT cursor, session_id, chat_id
          FROM json_to_recordset(:turns) AS t (cursor bigint, session_id text, chat_id text)
    ), {current_sessions("sought", "turns")}
"""  # noqa: S608  # only a constant is inserted, never input
_SELECT_CHATS = text(
    f"""
    {_TURNS}
    SELECT t.cursor, t.session_id, t.chat_id, c.chat_id IS NOT NULL AS is_there, c.assistant_id, c.external_id,
           c.status, c.cost, c.variables, c.created_at, c.updated_at, c.deleted_at, c.source, c.session_name
      FROM turns t LEFT JOIN archiver.chats c ON c.session_id = t.session_id AND c.chat_id = t.chat_id
    """  # noqa: S608  # only a constant is inserted, never input
)
_SELECT_ERASED = text(
    f"""
    {_TURNS}
    SELECT t.cursor, min(e.erased_at) AS erased_at
      FROM turns t JOIN archiver.erasures e ON e.session_id = t.session_id
     WHERE e.chat_id = t.chat_id OR (e.chat_id = '' AND e.session_id <> '') GROUP BY t.cursor
    """  # noqa: S608  # only a constant is inserted, never input
)
# Turns with more content than fits into a body are not read.
_SELECT_MESSAGES = text(
    f"""
    {_TURNS}, sized AS MATERIALIZED (
        SELECT t.cursor, sum(octet_length(m.content)) AS bytes FROM turns t
          JOIN archiver.messages m ON m.session_id = t.session_id AND m.chat_id = t.chat_id GROUP BY t.cursor
    ), fitting AS MATERIALIZED (
        SELECT t.* FROM turns t JOIN sized s ON s.cursor = t.cursor WHERE s.bytes <= :most
    )
    SELECT t.cursor, m.role, m.content, m.source FROM fitting t
      JOIN archiver.messages m ON m.session_id = t.session_id AND m.chat_id = t.chat_id ORDER BY t.cursor, m.ordinal
    """  # noqa: S608  # only a constant is inserted, never input
)
_SELECT_SIZES = text(
    f"""
    {_TURNS}
    SELECT t.cursor, sum(octet_length(m.content)) > :most AS is_large FROM turns t
      JOIN archiver.messages m ON m.session_id = t.session_id AND m.chat_id = t.chat_id GROUP BY t.cursor
    """  # noqa: S608  # only a constant is inserted, never input
)


def _select_turns(connection: Connection, due: Sequence[Due]) -> dict[int, Data]:
    if not due:
        return {}
    turns = [{"cursor": each.cursor, "session_id": each.session_id, "chat_id": each.chat_id} for each in due]
    values = {"turns": as_json(turns)}
    sized = values | {"most": MAX_BYTES}
    erased = {row.cursor: row.erased_at for row in connection.execute(_SELECT_ERASED, values)}
    by_cursor: dict[int, Data] = {}
    for row in connection.execute(_SELECT_CHATS, values).mappings():
        data = {"cursor": row["cursor"], "session_id": row["session_id"] or None, "chat_id": row["chat_id"]}
        if row["cursor"] in erased:
            data["erased_at"] = erased[row["cursor"]]
        else:
            data["chat"] = {name: row[name] for name in _CHAT} if row["is_there"] else None
            data["messages"] = []
        by_cursor[row["cursor"]] = data
    for cursor, is_large in connection.execute(_SELECT_SIZES, sized):
        if is_large and "messages" in by_cursor[cursor]:
            del by_cursor[cursor]["messages"]
            by_cursor[cursor]["truncated"] = True
    for cursor, role, content, source in connection.execute(_SELECT_MESSAGES, sized):
        if "messages" in by_cursor[cursor]:
            by_cursor[cursor]["messages"].append({"role": role, "content": content, "source": source})
    return by_cursor


_CHAT = (
    "assistant_id",
    "external_id",
    "session_name",
    "status",
    "cost",
    "variables",
    "created_at",
    "updated_at",
    "deleted_at",
    "source",
)
_SELECT_ERASED_SESSIONS = text(
    """
    SELECT session_id, erased_at FROM archiver.erasures
     WHERE chat_id = '' AND session_id IN (SELECT json_array_elements_text(:session_ids))
    """
)
# One at a time: for one session id the view uses indexes; for several it would read all sessions.
_SELECT_CONVERSATION = text("SELECT * FROM analytics.conversations WHERE session_id = :session_id")


def _select_conversations(connection: Connection, due: Sequence[Due]) -> dict[int, Data]:
    if not due:
        return {}
    session_ids = sorted({each.session_id for each in due})
    ids_json = {"session_ids": as_json(session_ids)}
    erased = {row.session_id: row.erased_at for row in connection.execute(_SELECT_ERASED_SESSIONS, ids_json)}
    values: dict[str, Mapping[str, Any] | None] = {}
    for session_id in session_ids:
        if session_id not in erased:
            row = connection.execute(_SELECT_CONVERSATION, {"session_id": session_id}).mappings().first()
            values[session_id] = None if row is None else {name: row[name] for name in _CONVERSATION}
    by_cursor: dict[int, Data] = {}
    for each in due:
        data: Data = {"cursor": each.cursor, "session_id": each.session_id}
        if each.session_id in erased:
            data["erased_at"] = erased[each.session_id]
        else:
            data["conversation"] = values[each.session_id]
        by_cursor[each.cursor] = data
    return by_cursor


_CONVERSATION = (
    "assistant_id",
    "name",
    "status",
    "started_at",
    "last_message_at",
    "chats",
    "messages",
    "user_messages",
    "assistant_messages",
    "cost",
    "deleted_chats",
    "coverage",
    "repaired_messages",
    "reconciled_at",
)
