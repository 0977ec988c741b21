"""The figures of the first page. None reads the whole archive."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver.operations import heartbeats
from archiver.operations.heartbeats import Worker
from archiver.operations.overview import Silence, select_silence
from archiver.outbound.feed import Backlog, select_backlog
from archiver.outbound.followups.review import FollowupStats, select_stats

DAYS = 30
EXAMINED = 10_000  # newest conversations whose coverage is counted
MAX_COUNTED = 1_000  # quarantined deliveries


class Day(msgspec.Struct, frozen=True):
    """The figures of a day in UTC, all assistants together."""

    day: date
    conversations_started: int
    messages: int
    cost: Decimal | None
    repaired_messages: int


class Overview(msgspec.Struct, frozen=True):
    """The state of the archive.

    `coverage`: of the newest `EXAMINED` conversations; `quarantine`: at most `MAX_COUNTED`.
    """

    days: Sequence[Day]
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


def select_overview(connection: Connection) -> Overview:
    """Return the state of the archive."""
    return Overview(
        days=_select_days(connection),
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


def _select_days(connection: Connection) -> list[Day]:
    """Return the last `DAYS` days in order, also those without messages."""
    today = datetime.now(UTC).date()
    values: dict[str, Any] = {"after": today - timedelta(days=DAYS), "today": today}
    found = {row.day: Day(*row) for row in connection.execute(_DAYS, values)}
    days = (today - timedelta(days=ago) for ago in reversed(range(DAYS)))
    return [found.get(day, Day(day, 0, 0, None, 0)) for day in days]
