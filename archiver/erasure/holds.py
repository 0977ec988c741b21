"""Legal holds: what one in force covers is neither erased nor expired."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, insert, select, text, update

from archiver import acts, ledger, tables
from archiver.erasure.targets import Target, as_json


class Criteria(msgspec.Struct, frozen=True):
    """What a hold covers: sessions to which all of this applies; None: any.

    `since` and `until`: sessions with a turn that began at or after the one and before the other.
    """

    session_id: str | None = None
    assistant_id: str | None = None
    variable: str | None = None
    value: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_empty(self) -> bool:
        return all(each is None for each in msgspec.structs.astuple(self))


class HoldError(Exception):
    """There is no such hold in force; the text says what to do."""


def insert_hold(connection: Connection, criteria: Criteria, author: str, reason: str) -> int:
    """Place a hold; answers its id. What is ordered to be erased afterwards meets it: nobody orders meanwhile."""
    if criteria.is_empty:
        raise HoldError("A hold needs something to hold: name a session, an assistant, a variable or a time.")
    ledger.lock_placement(connection, exclusive=True)
    holds = tables.holds
    row = {"placed_at": datetime.now(UTC), "author": author, "reason": reason, **msgspec.structs.asdict(criteria)}
    hold_id = int(connection.execute(insert(holds).returning(holds.c.id), row).scalar_one())
    # The value may say who somebody is, and the trail is for ever.
    told = {name: _plain(value) for name, value in row.items() if name in _TOLD and value is not None}
    acts.insert_act(connection, "hold.add", author, reason, {"hold": hold_id, **told})
    return hold_id


_TOLD = ("session_id", "assistant_id", "variable", "since", "until")


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def release_hold(connection: Connection, hold_id: int, who: str, reason: str) -> None:
    """End a hold. Raises `HoldError` where there is none of this id in force."""
    holds = tables.holds
    ended = update(holds).where(holds.c.id == hold_id, holds.c.released_at.is_(None))
    values = {"released_at": datetime.now(UTC), "released_by": who}
    if connection.execute(ended.values(values).returning(holds.c.id)).one_or_none() is None:
        raise HoldError(f"No hold {hold_id} is in force; see archiver hold list --all")
    acts.insert_act(connection, "hold.release", who, reason, {"hold": hold_id})


def select_holds(connection: Connection, *, released: bool) -> Sequence[RowMapping]:
    """The holds in force, or all of them, oldest first."""
    holds = tables.holds
    query = select(holds).order_by(holds.c.id)
    return connection.execute(query if released else query.where(holds.c.released_at.is_(None))).mappings().all()


# A turn without a session is held by what it says itself, and by what holds any session that is known to have it.
_COVERING = text(
    """
    WITH told AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
    ), places AS MATERIALIZED (
        SELECT session_id, chat_id, session_id AS place FROM told
        UNION
        SELECT t.session_id, t.chat_id, c.session_id FROM told t JOIN archiver.chats c ON c.chat_id = t.chat_id
         WHERE t.session_id = ''
    ), turns AS MATERIALIZED (
        SELECT p.place, c.chat_id, c.assistant_id, c.variables,
               coalesce(c.created_at, c.occurred_at, c.first_received_at) AS began_at
          FROM (SELECT DISTINCT place, CASE WHEN place = '' THEN chat_id END AS only FROM places) p
          JOIN archiver.chats c ON c.session_id = p.place AND c.chat_id = coalesce(p.only, c.chat_id)
         WHERE EXISTS (SELECT FROM archiver.holds WHERE released_at IS NULL)
    )
    SELECT DISTINCT p.session_id, p.chat_id, h.id
      FROM places p CROSS JOIN archiver.holds h
      LEFT JOIN archiver.sessions s ON s.session_id = p.place AND p.place <> ''
     WHERE h.released_at IS NULL
       AND (h.session_id IS NULL OR h.session_id = p.place)
       AND (h.assistant_id IS NULL OR s.assistant_id = h.assistant_id
            OR EXISTS (SELECT FROM turns t WHERE t.place = p.place AND (p.place <> '' OR t.chat_id = p.chat_id)
                          AND t.assistant_id = h.assistant_id))
       AND (h.variable IS NULL
            OR EXISTS (SELECT FROM turns t WHERE t.place = p.place AND (p.place <> '' OR t.chat_id = p.chat_id)
                          AND t.variables ->> h.variable = h.value))
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
    """Those of these targets that are held, each with the ids of the holds."""
    held: dict[Target, list[int]] = defaultdict(list)
    if targets:
        for row in connection.execute(_COVERING, {"targets": as_json(targets)}):
            held[Target(row.session_id, row.chat_id)].append(row.id)
    return {target: sorted(ids) for target, ids in sorted(held.items())}


_IS_ANY = text("SELECT EXISTS (SELECT FROM archiver.holds WHERE released_at IS NULL)")


def is_any_in_force(connection: Connection) -> bool:
    """Whether anything at all is held."""
    return bool(connection.scalar(_IS_ANY))
