"""One screen of figures about an archive: what it holds, how fresh it is, and what waits for a person."""

from datetime import datetime

import msgspec
from sqlalchemy import Connection, text


class Overview(msgspec.Struct, frozen=True):
    """Counts are rows; `sizes` in bytes by table, indexes included."""

    events: int
    deliveries: int
    last_event_at: datetime | None
    sessions: int
    chats: int
    deleted_chats: int
    messages: int
    coverage: dict[str, int]
    quarantine: int
    quarantine_reasons: dict[str, int]
    seals: int
    sealed_at: datetime | None
    unsealed: int
    sizes: dict[str, int]


def select_overview(connection: Connection) -> Overview:
    """Exact counts; reads every table once."""
    ledger = connection.execute(
        text(
            "SELECT count(*) AS events, coalesce(sum(delivery_count), 0)::bigint AS deliveries,"
            " max(last_received_at) AS last_event_at,"
            " count(*) FILTER (WHERE id > (SELECT coalesce(max(events_through), 0) FROM archiver.seals)) AS unsealed"
            " FROM archiver.events"
        )
    ).one()
    seals = connection.execute(
        text("SELECT coalesce(max(id), 0) AS newest, max(sealed_at) AS sealed_at FROM archiver.seals")
    ).one()
    chats = connection.execute(
        text("SELECT count(*) AS chats, count(deleted_at) AS deleted FROM archiver.chats")
    ).one()
    coverage = _counts(
        connection, "SELECT coverage, count(*) FROM archiver.sessions WHERE session_id <> '' GROUP BY 1 ORDER BY 1"
    )
    reasons = _counts(connection, "SELECT reason, count(*) FROM archiver.quarantine GROUP BY 1 ORDER BY 1")
    return Overview(
        events=ledger.events,
        deliveries=ledger.deliveries,
        last_event_at=ledger.last_event_at,
        sessions=sum(coverage.values()),
        chats=chats.chats,
        deleted_chats=chats.deleted,
        messages=connection.scalar(text("SELECT count(*) FROM archiver.messages")) or 0,
        coverage=coverage,
        quarantine=sum(reasons.values()),
        quarantine_reasons=reasons,
        seals=seals.newest,
        sealed_at=seals.sealed_at,
        unsealed=ledger.unsealed,
        sizes=_counts(
            connection,
            "SELECT c.relname, pg_total_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n"
            " ON n.oid = c.relnamespace WHERE n.nspname = 'archiver' AND c.relkind = 'r' ORDER BY 1",
        ),
    )


def _counts(connection: Connection, query: str) -> dict[str, int]:
    return {str(name): int(count) for name, count in connection.execute(text(query))}
