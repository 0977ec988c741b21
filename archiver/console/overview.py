"""The figures of the first page. None reads the whole archive."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, RowMapping, text

from archiver.operations import heartbeats
from archiver.operations.heartbeats import Worker
from archiver.operations.overview import Silence, select_silence
from archiver.outbound.feed import Backlog, select_backlog
from archiver.outbound.followups.review import FollowupStats, select_stats

DAYS, HOURS = 30, 48
EXAMINED = 10_000  # newest conversations whose coverage is counted
MAX_COUNTED = 1_000  # quarantined deliveries


class Figures(msgspec.Struct, frozen=True):
    """The figures of a day or an hour in UTC, all assistants together. `label`: when it begins."""

    label: str
    conversations_started: int
    messages: int
    cost: Decimal | None
    repaired_messages: int


class Overview(msgspec.Struct, frozen=True):
    """The state of the archive.

    `figures`: of days, or of hours. `conversations`: as estimated by Postgres, None before it has examined the table.
    `coverage`: of the newest `EXAMINED` conversations; `quarantine`: at most `MAX_COUNTED`.
    """

    figures: Sequence[Figures]
    conversations: int | None
    coverage: Sequence[RowMapping]
    complete_through: datetime | None
    last_event_at: datetime | None
    quarantine: int
    seal: RowMapping | None
    backlog: Backlog
    followups: FollowupStats
    workers: Sequence[Worker]
    silence: Silence
    examined: int = EXAMINED
    max_counted: int = MAX_COUNTED


_DAYS = text(
    """
    SELECT day, sum(conversations_started)::bigint AS conversations_started, sum(messages)::bigint AS messages,
           sum(cost) AS cost, sum(repaired_messages)::bigint AS repaired_messages
      FROM analytics.daily WHERE day > :after AND day <= :today GROUP BY day ORDER BY day
    """
)
_HOURS = text(
    """
    SELECT hour, sum(conversations_started)::bigint AS conversations_started, sum(messages)::bigint AS messages,
           sum(cost) AS cost, sum(repaired_messages)::bigint AS repaired_messages
      FROM analytics.hourly('UTC', since => :since) GROUP BY hour ORDER BY hour
    """
)
# What autovacuum counted last: a count of its own would read the whole table.
_CONVERSATIONS = text("SELECT reltuples FROM pg_class WHERE oid = CAST('archiver.summaries' AS regclass)")
_COVERAGE = text(
    """
    SELECT coverage, count(*) AS conversations
      FROM (SELECT coverage FROM analytics.sessions ORDER BY last_message_at DESC, session_id DESC LIMIT :most) s
     GROUP BY coverage ORDER BY count(*) DESC, coverage
    """
)
_LAST_EVENT = text("SELECT last_received_at FROM archiver.events ORDER BY id DESC LIMIT 1")
_QUARANTINE = text("SELECT count(*) FROM (SELECT FROM archiver.quarantine LIMIT :most) AS counted")
_SEAL = text("SELECT id, sealed_at, events_through FROM archiver.seals ORDER BY id DESC LIMIT 1")


def select_overview(connection: Connection, *, by_hour: bool = False) -> Overview:
    """Return the state of the archive, with figures of each day or of each hour."""
    estimated = connection.scalar(_CONVERSATIONS)
    return Overview(
        figures=_select_hours(connection) if by_hour else _select_days(connection),
        conversations=None if estimated is None or estimated < 0 else round(estimated),
        coverage=connection.execute(_COVERAGE, {"most": EXAMINED}).mappings().all(),
        complete_through=connection.scalar(text("SELECT analytics.complete_through()")),
        last_event_at=connection.scalar(_LAST_EVENT),
        quarantine=connection.scalar(_QUARANTINE, {"most": MAX_COUNTED}) or 0,
        seal=connection.execute(_SEAL).mappings().one_or_none(),
        backlog=select_backlog(connection),
        followups=select_stats(connection),
        workers=heartbeats.select_workers(connection),
        silence=select_silence(connection),
    )


def _select_days(connection: Connection) -> list[Figures]:
    """Return the last `DAYS` days in order, also those without messages."""
    today = datetime.now(UTC).date()
    rows = connection.execute(_DAYS, {"after": today - timedelta(days=DAYS), "today": today})
    return _filled(rows, [today - timedelta(days=ago) for ago in reversed(range(DAYS))], "%Y-%m-%d")


def _select_hours(connection: Connection) -> list[Figures]:
    """Return the last `HOURS` hours in order, also those without messages."""
    latest = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    hours = [latest - timedelta(hours=ago) for ago in reversed(range(HOURS))]
    return _filled(connection.execute(_HOURS, {"since": hours[0]}), hours, "%Y-%m-%d %H:%M")


def _filled(rows: Iterable[Row[Any]], times: Sequence[date], form: str) -> list[Figures]:
    """Return the figures of these days or hours, zero for those that the rows lack."""
    found = {row[0]: row[1:] for row in rows}
    return [Figures(time.strftime(form), *found.get(time, (0, 0, None, 0))) for time in times]
