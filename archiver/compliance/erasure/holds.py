"""Place and release legal holds. Content under a hold is neither erased nor expired."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, insert, select, text, update

from archiver.compliance.erasure.targets import Target
from archiver.compliance.legal_holds import LOGGED, Criteria, select_in_force, select_placed, value_digest
from archiver.database import Lock, as_json, limit, limit_locks, tables
from archiver.errors import ArchiverError
from archiver.ledger import audit_log


class HoldError(ArchiverError):
    """The hold has no criteria or is not in force; the message names the remedy."""


def insert_hold(connection: Connection, criteria: Criteria, author: str, reason: str) -> int:
    """Place a hold and return its id. Erasures ordered later respect it."""
    if criteria.is_empty:
        raise HoldError("a hold needs at least one of: session, assistant, variable, time")
    Lock.RECORDING.take(connection, exclusive=True)
    holds = tables.holds
    salt = None if criteria.value is None else os.urandom(16)
    row = {"placed_at": datetime.now(UTC), "author": author, "reason": reason, "salt": salt}
    row |= msgspec.structs.asdict(criteria)
    hold_id = int(connection.execute(insert(holds).returning(holds.c.id), row).scalar_one())
    # The value may identify a person, and the audit log is permanent, so the log contains only a salted digest; the
    # salt is deleted with the value when the hold is released.
    row_values = {name: _plain(value) for name, value in row.items() if name in LOGGED and value is not None}
    if salt is not None and criteria.value is not None:
        row_values["value_digest"] = value_digest(salt, criteria.value)
    audit_log.insert_entry(connection, "hold.add", author, reason, {"hold": hold_id, **row_values})
    return hold_id


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def release_hold(connection: Connection, hold_id: int, who: str, reason: str) -> None:
    """Release a hold. Raises `HoldError` if no hold with this id is in force."""
    holds = tables.holds
    ended = update(holds).where(holds.c.id == hold_id, holds.c.released_at.is_(None))
    values = {"released_at": datetime.now(UTC), "released_by": who}
    is_ended = connection.execute(ended.values(values).returning(holds.c.id)).one_or_none() is not None
    # The row may be missing or marked as released: the audit log is authoritative.
    if not is_ended and hold_id not in {hold.id for hold in select_in_force(connection)}:
        raise HoldError(f"hold {hold_id} is not in force; see `archiver hold list --all`")
    audit_log.insert_entry(connection, "hold.release", who, reason, {"hold": hold_id})


_SHOWN = tuple(column for column in tables.holds.c if column.name != "salt")


def select_holds(connection: Connection, *, released: bool) -> Sequence[Mapping[str, Any]]:
    """Return the holds in force, with `released` also the others, oldest first.

    `has_row` is false if only the audit log records the hold.
    """
    rows = connection.execute(select(*_SHOWN).order_by(tables.holds.c.id)).mappings().all()
    result = [{**row, "has_row": True} for row in rows if released or row["released_at"] is None]
    placed, _ = select_placed(connection)
    known = {row["id"] for row in result if row["released_at"] is None}
    for hold in select_in_force(connection):
        if hold.id not in known:
            log = placed[hold.id]
            result.append(
                {"id": hold.id, "placed_at": log.placed_at, "author": log.author, "reason": log.reason or ""}
                | {name: getattr(hold, name) for name in Criteria.__struct_fields__}
                | {"released_at": None, "released_by": None, "has_row": False}
            )
    return sorted(result, key=lambda row: int(row["id"]))


# An unassigned turn is held by holds on its own fields, and by holds on any session that contains it. Lateral
# subqueries with OFFSET 0, because Postgres does not know how few targets there are, and might read all sessions.
_COVERING = text(
    """
    WITH requested AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    ), places AS MATERIALIZED (
        SELECT session_id, chat_id, session_id AS place FROM requested
        UNION
        SELECT t.session_id, t.chat_id, c.session_id
          FROM requested t
         CROSS JOIN LATERAL (SELECT session_id FROM archiver.chats c WHERE c.chat_id = t.chat_id OFFSET 0) c
         WHERE t.session_id = ''
    ), turns AS MATERIALIZED (
        SELECT p.place, c.chat_id, c.assistant_id, c.variables,
               coalesce(c.created_at, c.occurred_at, c.first_received_at) AS began_at
          FROM (SELECT DISTINCT place, CASE WHEN place = '' THEN chat_id END AS only FROM places) p
         CROSS JOIN LATERAL (
             SELECT * FROM archiver.chats c
              WHERE c.session_id = p.place AND c.chat_id = coalesce(p.only, c.chat_id) AND c.chat_id <> E'\\x1f'
             OFFSET 0
         ) c
    ), holds AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:holds) AS h (id bigint, session_id text, assistant_id text, variable text,
                                                      value text, is_any_value boolean, since timestamptz,
                                                      until timestamptz)
    )
    SELECT DISTINCT p.session_id, p.chat_id, h.id
      FROM places p CROSS JOIN holds h
      LEFT JOIN LATERAL (
          SELECT * FROM archiver.sessions s WHERE s.session_id = p.place AND p.place <> '' OFFSET 0
      ) s ON true
     WHERE (h.session_id IS NULL OR h.session_id = p.place)
       AND (h.assistant_id IS NULL OR s.assistant_id = h.assistant_id
            OR EXISTS (SELECT FROM turns t WHERE t.place = p.place AND (p.place <> '' OR t.chat_id = p.chat_id)
                          AND t.assistant_id = h.assistant_id))
       AND (h.variable IS NULL
            OR EXISTS (SELECT FROM turns t WHERE t.place = p.place AND (p.place <> '' OR t.chat_id = p.chat_id)
                          AND (t.variables ->> h.variable = h.value
                               OR h.is_any_value AND jsonb_exists(t.variables, h.variable))))
       AND ((h.since IS NULL AND h.until IS NULL)
            OR (NOT EXISTS (SELECT FROM turns t WHERE t.place = p.place)
                AND coalesce(s.created_at, s.first_event_at) >= coalesce(h.since, '-infinity')
                AND coalesce(s.created_at, s.first_event_at) < coalesce(h.until, 'infinity'))
            OR EXISTS (SELECT FROM turns t WHERE t.place = p.place AND (p.place <> '' OR t.chat_id = p.chat_id)
                          AND t.began_at >= coalesce(h.since, '-infinity')
                          AND t.began_at < coalesce(h.until, 'infinity')))
    """
)


def covering(connection: Connection, targets: Sequence[Target]) -> Mapping[Target, list[int]]:
    """Return the held targets, each with the ids of its holds."""
    held: dict[Target, list[int]] = defaultdict(list)
    if targets and (holds := select_in_force(connection)):
        targets_json = {"targets": as_json(targets), "holds": as_json(holds)}
        for row in connection.execute(_COVERING, targets_json):
            held[Target(row.session_id, row.chat_id)].append(row.id)
    return {target: sorted(ids) for target, ids in sorted(held.items())}


EXCLUSIVE_SECONDS = 2.0  # limit of a statement and of a lock wait, while all writers wait


def exclude_held(
    connection: Connection, targets: Sequence[Target], *, exclusive: bool
) -> tuple[list[Target], Mapping[Target, Sequence[int]]]:
    """Return the targets that no hold covers, and the others with their holds.

    Takes `Lock.RECORDING`, so that no hold is placed until the end of the transaction. `exclusive`: takes it
    exclusively, and limits each statement and lock wait to `EXCLUSIVE_SECONDS`.
    """
    if exclusive:
        limit(connection, EXCLUSIVE_SECONDS)
        limit_locks(connection, EXCLUSIVE_SECONDS)
    Lock.RECORDING.take(connection, exclusive=exclusive)
    held = covering(connection, targets)
    return [target for target in targets if target not in held], held


def is_any_in_force(connection: Connection) -> bool:
    """Return whether any hold is in force."""
    return bool(select_in_force(connection))
