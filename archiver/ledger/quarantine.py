"""The quarantine: authenticated deliveries that could not be archived, with bytes and reason.

An internal fact, such as a history response, also stores its type, session and dedupe key.
"""

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    RowMapping,
    bindparam,
    cast,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from archiver import events
from archiver.database import BulkInsert, tables
from archiver.events import Content, Delivery, Malformed

# Reasons for deliveries that could be parsed: faults of the archiver or the database.
NOT_STORABLE, NOT_PROCESSABLE, TOO_SLOW = "not_storable", "not_processable", "too_slow"
REASONS = (*events.REASONS, NOT_STORABLE, NOT_PROCESSABLE, TOO_SLOW)


def _quarantine_upsert() -> BulkInsert:
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
    return BulkInsert(upsert, [column.name for column in quarantine.c if column.name != "id"])


_UPSERT = _quarantine_upsert()


def upsert_quarantine(
    connection: Connection, deliveries: Sequence[Delivery[Content]], reason: str = "", detail: str = ""
) -> list[int]:
    """Store each of these deliveries once, count repeats, and return the quarantine ids in the same order.

    `reason`, one of `REASONS`, and `detail`, a sentence without content, apply to deliveries that could be parsed.
    """
    if not deliveries:
        return []
    digests = [digest_of(delivery) for delivery in deliveries]
    rows: dict[bytes, dict[str, Any]] = {}
    for digest, delivery in zip(digests, deliveries, strict=True):
        row = rows.setdefault(digest, _row(digest, delivery))
        content = delivery.content
        if isinstance(content, Malformed):
            row |= {"reason": content.reason, "detail": content.detail}
        else:
            row |= {"reason": reason, "detail": detail}
        row["delivery_count"] += delivery.count
        row["last_received_at"] = delivery.received_at
    answered = _UPSERT.execute(connection, [rows[digest] for digest in sorted(rows)])
    ids = {bytes(row.body_digest): row.id for row in answered}
    return [ids[digest] for digest in digests]


def digest_of(delivery: Delivery[Content]) -> bytes:
    """Return the digest that identifies the delivery in the quarantine."""
    _, session_id, dedupe_key = delivery.internal
    if session_id is None or dedupe_key is None:
        return hashlib.sha256(delivery.content.body).digest()
    return hashlib.sha256(session_id.encode() + b"\0" + dedupe_key).digest()


def _row(digest: bytes, delivery: Delivery[Content]) -> dict[str, Any]:
    kind, session_id, dedupe_key = delivery.internal
    return {
        "body_digest": digest,
        "body": delivery.content.body,
        "received_at": delivery.received_at,
        "key_id": delivery.key_id,
        "delivery_count": 0,
        "source": delivery.source,
        "type": kind,
        "session_id": session_id,
        "dedupe_key": dedupe_key,
    }


def select_quarantine(
    connection: Connection,
    *,
    after: int = 0,
    limit: int = 100,
    reason: str | None = None,
    only: Sequence[int] | None = None,
) -> Sequence[RowMapping]:
    """Return rows without bodies (`bytes`: their size), oldest first, starting after id `after`.

    `only`: restricts the result to these ids.
    """
    quarantine = tables.quarantine
    columns = [column for column in quarantine.c if column.name not in {"body", "body_digest", "dedupe_key"}]
    query = select(*columns, func.length(quarantine.c.body).label("bytes")).where(quarantine.c.id > after)
    if reason is not None:
        query = query.where(quarantine.c.reason == reason)
    if only is not None:
        query = query.where(_is_one_of(only))
    return connection.execute(query.order_by(quarantine.c.id).limit(limit)).mappings().all()


def _is_one_of(quarantine_ids: Sequence[int]) -> ColumnElement[bool]:
    ids = func.json_array_elements_text(bindparam("ids", list(quarantine_ids), JSON, unique=True))
    return tables.quarantine.c.id.in_(select(cast(ids, BigInteger)))


def select_quarantined(connection: Connection, quarantine_id: int, *, lock: bool = False) -> RowMapping | None:
    """Return one row with its body. `lock`: lock it until the transaction ends."""
    query = select(tables.quarantine).where(tables.quarantine.c.id == quarantine_id)
    return connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()


def select_reasons(connection: Connection) -> list[str]:
    """Return the distinct reasons in the quarantine."""
    return list(connection.scalars(select(tables.quarantine.c.reason).distinct()))


def delete_quarantined(connection: Connection, quarantine_id: int) -> None:
    """Delete a row whose bytes are now in the ledger."""
    connection.execute(delete(tables.quarantine).where(tables.quarantine.c.id == quarantine_id))


_SELECT_BODIES = (
    select(tables.quarantine.c.id, tables.quarantine.c.session_id, tables.quarantine.c.body)
    .where(tables.quarantine.c.id > bindparam("after"))
    .order_by(tables.quarantine.c.id)
    .limit(bindparam("most"))
)
BODIES_PER_PAGE = 50  # read at a time


def select_every_body(connection: Connection) -> Iterator[RowMapping]:
    """Yield each row's `id`, `session_id` and `body`, in order of their ids, a few at a time."""
    after = 0
    while page := connection.execute(_SELECT_BODIES, {"after": after, "most": BODIES_PER_PAGE}).mappings().all():
        yield from page
        after = page[-1]["id"]


def select_bodies(connection: Connection, quarantine_ids: Sequence[int]) -> Iterator[RowMapping]:
    """Yield `id`, `session_id` and `body` of these rows, in order of their ids."""
    for start in range(0, len(quarantine_ids), BODIES_PER_PAGE):
        some = _is_one_of(quarantine_ids[start : start + BODIES_PER_PAGE])
        yield from (
            connection.execute(_SELECT_BODIES.where(some), {"after": 0, "most": BODIES_PER_PAGE}).mappings().all()
        )


def lock_rows(connection: Connection, quarantine_ids: Sequence[int]) -> None:
    """Lock the existing rows until the end of the transaction."""
    quarantine = tables.quarantine.c
    query = select(quarantine.id).where(_is_one_of(quarantine_ids)).order_by(quarantine.id)
    connection.execute(query.with_for_update())


def select_older(connection: Connection, before: datetime, limit: int, after: int = 0) -> list[int]:
    """Return up to `limit` ids, in ascending order, of rows after this id that first arrived before a time."""
    quarantine = tables.quarantine.c
    query = (
        select(quarantine.id)
        .where(quarantine.received_at < before, quarantine.id > after)
        .order_by(quarantine.id)
        .limit(limit)
    )
    return list(connection.scalars(query))


def delete_rows(connection: Connection, quarantine_ids: Sequence[int]) -> int:
    """Delete these rows permanently; return the number deleted."""
    if not quarantine_ids:
        return 0
    quarantine = tables.quarantine
    deleted = delete(quarantine).where(_is_one_of(quarantine_ids)).returning(quarantine.c.id)
    return len(connection.execute(deleted).all())


def update_reason(connection: Connection, quarantine_id: int, reason: str, detail: str) -> None:
    """Update the reason and the detail of a row that remains in quarantine."""
    connection.execute(
        update(tables.quarantine).where(tables.quarantine.c.id == quarantine_id).values(reason=reason, detail=detail)
    )
