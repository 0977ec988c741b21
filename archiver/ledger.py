"""record(): the one write path. Appends observations to the ledger once, and projects what is new."""

import hashlib
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, func, text
from sqlalchemy.dialects.postgresql import insert

from archiver import projection, tables
from archiver.database import RowsInsert
from archiver.events import Event

Key = tuple[str, bytes]  # session_id, dedupe_key


class Observation(msgspec.Struct, frozen=True):
    """A fact told: what, when it reached us, whence, which secret proved it; `deliveries` of it at once or before."""

    event: Event
    received_at: datetime
    source: str
    key_id: str | None
    deliveries: int = 1

    @property
    def key(self) -> Key:
        return self.event.session_id, self.event.dedupe_key


class Recorded(msgspec.Struct, frozen=True):
    """The ledger's answer to one observation: its row, and whether this very observation made it."""

    id: int
    is_new: bool


def record(connection: Connection, observations: Sequence[Observation]) -> list[Recorded]:
    """Append what the ledger does not hold, count what it does, and project what is new, in this transaction.

    Answers in the order of `observations`. Safe against other writers of the same facts: ledger rows are taken in
    order of their keys, then sessions in order of theirs, so that no two writers wait for each other.
    """
    if not observations:
        return []
    _lock_placement(connection, exclusive=any(not observation.event.session_id for observation in observations))
    deliveries: dict[Key, list[Observation]] = {}
    for observation in observations:
        deliveries.setdefault(observation.key, []).append(observation)
    rows = _upsert_events(connection, deliveries)
    projection.project(connection, [fact for key, row in rows.items() if (fact := _changed(deliveries[key], row))])
    answers, told = [], set()
    for observation in observations:
        row = rows[observation.key]
        is_new = row.delivery_count == _count(deliveries[observation.key]) and observation.key not in told
        told.add(observation.key)
        answers.append(Recorded(id=row.id, is_new=is_new))
    return answers


# A fact without a session and a fact that tells the session of the same chat must see each other, whichever commits
# first. So the former are recorded alone, the latter beside each other. The number is arbitrary; the lock is
# per database and ends with the transaction.
_PLACEMENT_LOCK = 0x63616C6C_68710001
_LOCK_SHARED = text("SELECT pg_advisory_xact_lock_shared(:key)").bindparams(key=_PLACEMENT_LOCK)
_LOCK_EXCLUSIVE = text("SELECT pg_advisory_xact_lock(:key)").bindparams(key=_PLACEMENT_LOCK)


def _lock_placement(connection: Connection, *, exclusive: bool) -> None:
    connection.execute(_LOCK_EXCLUSIVE if exclusive else _LOCK_SHARED)


def _event_upsert() -> RowsInsert:
    events = tables.events
    statement = insert(events)
    new = statement.excluded
    upsert = statement.on_conflict_do_update(
        index_elements=[events.c.session_id, events.c.dedupe_key],
        set_={
            "delivery_count": events.c.delivery_count + new.delivery_count,
            "last_received_at": func.greatest(events.c.last_received_at, new.last_received_at),
            # A retry may carry a later envelope time: which of them came first must not matter.
            "occurred_at": func.least(events.c.occurred_at, new.occurred_at),
        },
    ).returning(
        events.c.session_id,
        events.c.dedupe_key,
        events.c.id,
        events.c.delivery_count,
        events.c.received_at,
        events.c.occurred_at,
    )
    return RowsInsert(upsert, [column.name for column in events.c if column.name != "id"])


_UPSERT_EVENT = _event_upsert()


def _upsert_events(connection: Connection, deliveries: dict[Key, list[Observation]]) -> dict[Key, Any]:
    rows = _UPSERT_EVENT.execute(connection, [_event_row(deliveries[key]) for key in sorted(deliveries)])
    return {(row.session_id, bytes(row.dedupe_key)): row for row in rows}


def _event_row(deliveries: Sequence[Observation]) -> dict[str, Any]:
    first = _first(deliveries)
    event, salt = first.event, os.urandom(16)
    return {
        "session_id": event.session_id,
        "dedupe_key": event.dedupe_key,
        "type": event.type,
        "source": first.source,
        "chat_id": event.chat_id,
        "received_at": first.received_at,
        "last_received_at": max(observation.received_at for observation in deliveries),
        "delivery_count": _count(deliveries),
        "occurred_at": _first_told(deliveries),
        "key_id": first.key_id,
        "body": event.body,
        "salt": salt,
        "body_digest": hashlib.sha256(salt + event.body).digest(),
    }


def _count(observations: Sequence[Observation]) -> int:
    return sum(observation.deliveries for observation in observations)


def _first_told(deliveries: Sequence[Observation]) -> datetime | None:
    return min((o.event.occurred_at for o in deliveries if o.event.occurred_at), default=None)


def _first(deliveries: Sequence[Observation]) -> Observation:
    return min(deliveries, key=lambda observation: observation.received_at)


def _changed(deliveries: Sequence[Observation], row: Any) -> projection.Fact | None:
    """The fact to project: a new one, or a known one that these deliveries may have moved back in time."""
    is_repeat = row.delivery_count > _count(deliveries)
    first_told = _first_told(deliveries)
    if is_repeat and (first_told is None or first_told != row.occurred_at):
        return None
    first = _first(deliveries)
    return projection.Fact(first.event, first.source, row.received_at, row.occurred_at, is_repeat)
