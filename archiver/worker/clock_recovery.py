"""Correct due times that are implausibly far in the future, because a clock was ahead."""

from datetime import timedelta

from sqlalchemy import Connection, text

from archiver import database
from archiver.archive import Timing

MAX_AHEAD = timedelta(hours=25)  # of a retry; a reading is due within the lifetime of its session

_MAKE_DUE = (
    "UPDATE archiver.sessions SET reconcile_at = :now WHERE reconcile_at > :beyond_reading",
    "UPDATE archiver.deliveries SET due_at = :now WHERE state = 'pending' AND due_at > :beyond",
    "UPDATE archiver.subscriptions SET open_until = :now WHERE open_until > :beyond",
    "UPDATE archiver.pauses SET until = :now WHERE until > :beyond",
    "UPDATE archiver_jobs.procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo' AND scheduled_at > :now",
)


def make_impossible_times_due(connection: Connection, timing: Timing) -> int:
    """Make rows with implausible due times due now, and all jobs that wait for a time; return the number of rows."""
    now = database.now()
    values = {"now": now, "beyond": now + MAX_AHEAD, "beyond_reading": now + timing.lifetime + MAX_AHEAD}
    return sum(
        connection.execute(text(each), {name: value for name, value in values.items() if f":{name}" in each}).rowcount
        for each in _MAKE_DUE
    )
