"""The tables as SQLAlchemy Core objects, which are also the target of Alembic. No statements and no logic."""

from archiver.database.tables.analytics import summaries
from archiver.database.tables.archive import (
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
from archiver.database.tables.console import logins, users
from archiver.database.tables.feed import attempts, changes, deliveries, outbox, subscriptions
from archiver.database.tables.operations import duties, epoch_faults, epochs, workers
from archiver.database.tables.rollups import contributions, days, rollups, stale_buckets, uncontributed
from archiver.database.tables.search import search, search_partitions, search_state

__all__ = [
    "SCHEMA",
    "acts",
    "attempts",
    "backfills",
    "changes",
    "chats",
    "contributions",
    "days",
    "deliveries",
    "duties",
    "epoch_faults",
    "epochs",
    "erasures",
    "events",
    "holds",
    "logins",
    "messages",
    "metadata",
    "outbox",
    "pauses",
    "pieces",
    "quarantine",
    "recounts",
    "removals",
    "rollups",
    "seals",
    "search",
    "search_partitions",
    "search_state",
    "sessions",
    "stale_buckets",
    "subscriptions",
    "summaries",
    "uncontributed",
    "users",
    "workers",
]
