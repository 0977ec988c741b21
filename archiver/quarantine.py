"""The quarantine: authenticated deliveries that could not be archived, with their bytes and the reason.

A fact of ours, such as a history answer, keeps what its bytes do not tell: its kind, its session, its key.
"""

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from archiver import events, tables
from archiver.database import RowsInsert
from archiver.events import WEBHOOK, Event

# Codes of `Reject.reason`; the last three are faults of ours or of the database, for what could be read.
NOT_STORABLE, NOT_PROCESSABLE, TOO_SLOW = "not_storable", "not_processable", "too_slow"
REASONS = (*events.REASONS, NOT_STORABLE, NOT_PROCESSABLE, TOO_SLOW)


class Reject(msgspec.Struct, frozen=True, gc=False):
    """One delivery for the quarantine: `reason` is a stable code, `detail` a sentence without content.

    `ours`: the fact, where it is none that its bytes tell by themselves.
    """

    body: bytes
    reason: str
    detail: str
    received_at: datetime
    key_id: str | None
    source: str = WEBHOOK
    ours: Event | None = None

    @property
    def digest(self) -> bytes:
        """Tells it apart from others."""
        ours = self.ours
        told = self.body if ours is None else ours.session_id.encode() + b"\0" + ours.dedupe_key
        return hashlib.sha256(told).digest()


def _quarantine_upsert() -> RowsInsert:
    quarantine = tables.quarantine
    statement = insert(quarantine)
    new = statement.excluded
    upsert = statement.on_conflict_do_update(
        index_elements=[quarantine.c.body_digest],
        set_={
            "delivery_count": quarantine.c.delivery_count + new.delivery_count,
            "last_received_at": func.greatest(quarantine.c.last_received_at, new.last_received_at),
            "reason": new.reason,
            "detail": new.detail,
        },
    ).returning(quarantine.c.body_digest, quarantine.c.id)
    return RowsInsert(upsert, [column.name for column in quarantine.c if column.name != "id"])


_UPSERT = _quarantine_upsert()


def upsert_quarantine(connection: Connection, rejects: Sequence[Reject]) -> list[int]:
    """Keep each of these deliveries once and count it. Answers the quarantine's ids, in their order."""
    if not rejects:
        return []
    digests = [reject.digest for reject in rejects]
    rows: dict[bytes, dict[str, Any]] = {}
    for digest, reject in zip(digests, rejects, strict=True):
        ours = reject.ours
        row = rows.setdefault(
            digest,
            {
                "body_digest": digest,
                "body": reject.body,
                "received_at": reject.received_at,
                "key_id": reject.key_id,
                "delivery_count": 0,
                "source": reject.source,
                "type": ours.type if ours else None,
                "session_id": ours.session_id if ours else None,
                "dedupe_key": ours.dedupe_key if ours else None,
            },
        )
        row["delivery_count"] += 1
        row |= {"reason": reject.reason, "detail": reject.detail, "last_received_at": reject.received_at}
    answered = _UPSERT.execute(connection, [rows[digest] for digest in sorted(rows)])
    ids = {bytes(row.body_digest): row.id for row in answered}
    return [ids[digest] for digest in digests]


def select_quarantine(
    connection: Connection,
    *,
    after: int = 0,
    limit: int = 100,
    reason: str | None = None,
    only: Sequence[int] | None = None,
) -> Sequence[RowMapping]:
    """Rows without their bodies (`bytes` tells their size), oldest first, beginning after id `after`.

    `only`: those of these ids.
    """
    quarantine = tables.quarantine
    columns = [column for column in quarantine.c if column.name not in {"body", "body_digest", "dedupe_key"}]
    query = select(*columns, func.length(quarantine.c.body).label("bytes")).where(quarantine.c.id > after)
    if reason is not None:
        query = query.where(quarantine.c.reason == reason)
    if only is not None:
        query = query.where(quarantine.c.id.in_(only))
    return connection.execute(query.order_by(quarantine.c.id).limit(limit)).mappings().all()


def select_quarantined(connection: Connection, quarantine_id: int, *, lock: bool = False) -> RowMapping | None:
    """One row with its body; `lock` holds it until the transaction ends."""
    query = select(tables.quarantine).where(tables.quarantine.c.id == quarantine_id)
    return connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()


def select_reasons(connection: Connection) -> list[str]:
    """The reasons that rows have."""
    return list(connection.scalars(select(tables.quarantine.c.reason).distinct()))


def delete_quarantined(connection: Connection, quarantine_id: int) -> None:
    """Let go of a row whose bytes the ledger now holds."""
    connection.execute(delete(tables.quarantine).where(tables.quarantine.c.id == quarantine_id))


_SELECT_BODIES = (
    select(tables.quarantine.c.id, tables.quarantine.c.session_id, tables.quarantine.c.body)
    .where(tables.quarantine.c.id > bindparam("after"))
    .order_by(tables.quarantine.c.id)
    .limit(bindparam("most"))
)
BODIES = 50  # read at a time


def select_every_body(connection: Connection) -> Iterator[RowMapping]:
    """Each row's `id`, `session_id` and `body`, in order of their ids, a few at a time."""
    after = 0
    while page := connection.execute(_SELECT_BODIES, {"after": after, "most": BODIES}).mappings().all():
        yield from page
        after = page[-1]["id"]


def select_bodies(connection: Connection, quarantine_ids: Sequence[int]) -> Iterator[RowMapping]:
    """Of these rows each one's `id`, `session_id` and `body`, in order of their ids."""
    for start in range(0, len(quarantine_ids), BODIES):
        some = tables.quarantine.c.id.in_(quarantine_ids[start : start + BODIES])
        yield from connection.execute(_SELECT_BODIES.where(some), {"after": 0, "most": BODIES}).mappings().all()


def lock_rows(connection: Connection, quarantine_ids: Sequence[int]) -> None:
    """Hold those of these rows that are there until the transaction ends."""
    quarantine = tables.quarantine.c
    query = select(quarantine.id).where(quarantine.id.in_(quarantine_ids)).order_by(quarantine.id)
    connection.execute(query.with_for_update())


def select_older(connection: Connection, before: datetime, limit: int, after: int = 0) -> list[int]:
    """Rows after this id that came, for the first time, before then; oldest first."""
    quarantine = tables.quarantine.c
    query = (
        select(quarantine.id)
        .where(quarantine.received_at < before, quarantine.id > after)
        .order_by(quarantine.id)
        .limit(limit)
    )
    return list(connection.scalars(query))


def delete_rows(connection: Connection, quarantine_ids: Sequence[int]) -> int:
    """Remove these for good; answers how many there were."""
    if not quarantine_ids:
        return 0
    quarantine = tables.quarantine
    gone = delete(quarantine).where(quarantine.c.id.in_(quarantine_ids)).returning(quarantine.c.id)
    return len(connection.execute(gone).all())


def update_reason(connection: Connection, quarantine_id: int, reason: str, detail: str) -> None:
    """Say why it is still quarantined."""
    connection.execute(
        update(tables.quarantine).where(tables.quarantine.c.id == quarantine_id).values(reason=reason, detail=detail)
    )
