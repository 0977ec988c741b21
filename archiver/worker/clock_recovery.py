"""Correct due times that are implausibly far in the future, because a clock was ahead."""

from sqlalchemy import Connection, text

from archiver import database
from archiver.archive import Timing
from archiver.database.clock import MAX_WAIT
from archiver.history import leases, shared_pause
from archiver.outbound.followups import deliveries, subscriptions

_RUN_JOBS = text(
    "UPDATE archiver_jobs.procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo' AND scheduled_at > :now"
)


def make_impossible_times_due(connection: Connection, timing: Timing) -> int:
    """Make rows with implausible due times due now, and all jobs that wait for a time; return the number of rows."""
    now = database.now()
    beyond = now + MAX_WAIT
    return (
        leases.make_due_beyond(connection, now, beyond + timing.lifetime)
        + deliveries.make_due_beyond(connection, now, beyond)
        + subscriptions.probe_beyond(connection, now, beyond)
        + shared_pause.end_pauses_beyond(connection, now, beyond)
        + connection.execute(_RUN_JOBS, {"now": now}).rowcount
    )
