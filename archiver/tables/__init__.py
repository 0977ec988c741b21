"""The tables, as SQLAlchemy Core and as Alembic's target. No statement and no logic."""

from archiver.tables.archive import (
    SCHEMA,
    acts,
    backfills,
    chats,
    erasures,
    events,
    holds,
    messages,
    metadata,
    pauses,
    pieces,
    quarantine,
    recounts,
    removals,
    seals,
    sessions,
)
from archiver.tables.feed import attempts, changes, deliveries, outbox, subscriptions
from archiver.tables.operations import duties, epochs, workers

__all__ = [
    "SCHEMA",
    "acts",
    "attempts",
    "backfills",
    "changes",
    "chats",
    "deliveries",
    "duties",
    "epochs",
    "erasures",
    "events",
    "holds",
    "messages",
    "metadata",
    "outbox",
    "pauses",
    "pieces",
    "quarantine",
    "recounts",
    "removals",
    "seals",
    "sessions",
    "subscriptions",
    "workers",
]
