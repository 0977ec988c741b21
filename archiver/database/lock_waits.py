"""Lock waits: report which session blocks the archiver, in logs, metrics and errors.

Postgres shows which session causes a wait only while it lasts, so a separate connection checks during the wait.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, telemetry
from archiver.database import explain, run_async, transaction
from archiver.database.locks import Lock, LockHolder, select_holders
from archiver.errors import ArchiverError
from archiver.telemetry.duty_health import Duty

log = structlog.get_logger(__name__)

CHECK_SECONDS = 5.0  # between two checks in a long-running process
CHECK_LIMIT_SECONDS = 3.0  # limit of a check
SOON_SECONDS = 0.5  # between two checks of a command
REPORT_SECONDS = 60.0
MAX_REPORTED = 3
PROBE_SECONDS = 2.0  # for a lock
INSUFFICIENT_PRIVILEGE = "42501"  # SQLSTATE


class LockTimeoutError(ArchiverError):
    """A lock was not granted in time; the message names the holder, if it is known."""


class WaitReport:
    """The log of lock waits: one line a minute for each session that blocks others, the first line immediately."""

    def __init__(self) -> None:
        self._reported_at = -REPORT_SECONDS

    def add(self, holders: Sequence[LockHolder]) -> None:
        """Update the metric with the result of a check, and log it if it is due."""
        telemetry.lock_waiters.set(sum(each.waiting for each in holders))
        if not holders or monotonic() - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at = monotonic()
        for each in holders[:MAX_REPORTED]:
            log.warning(
                "lock wait",
                pid=each.pid,
                user=each.user,
                application=each.application,
                since=each.since.isoformat() if each.since else None,
                waiting=each.waiting,
                waiting_since=each.waiting_since.isoformat(),
                tables=list(each.relations),
                advice=each.advice,
            )


async def report_waits(engine: AsyncEngine, duty: Duty | None = None) -> None:
    """Check every few seconds, until cancelled, which sessions block the archiver, and report them.

    Uses one connection.
    """
    report, duty = WaitReport(), duty or Duty("locks")
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        try:
            report.add(await run_async(engine, select_holders, CHECK_LIMIT_SECONDS))
        except (SQLAlchemyError, TimeoutError) as error:
            duty.failing(f"database: {explain(error)}")
        else:
            duty.working()


class LockWatch:
    """The lock holders found by the latest check that found any."""

    def __init__(self) -> None:
        self.holders: Sequence[LockHolder] = ()
        self.report = WaitReport()

    def explain(self) -> str:
        """Return a sentence that names the first lock holder and the remedy."""
        if not self.holders:
            return "Another session holds a lock that is needed: `archiver doctor` names it."
        first = self.holders[0]
        return f"Another session holds a lock that is needed: {first}.\n{first.advice}"


# Statements that acquire each lock as a writer does, and change nothing.
_WRITTEN = ("events", "sessions", "chats", "messages", "outbox")
_PROBES = (
    *(f"LOCK TABLE archiver_jobs.{lock} IN ROW EXCLUSIVE MODE" for lock in Lock),
    *(f"DELETE FROM archiver.{name} WHERE false" for name in _WRITTEN),  # noqa: S608  # only constant names are inserted, never input
)


_NOTHING_TO_PROBE = {INSUFFICIENT_PRIVILEGE, "42P01", "3F000"}  # a user who only reads; no such table, no such schema


def find_holders(engine: Engine) -> Sequence[LockHolder]:
    """Return sessions that block others, or that would block a writer now. Takes some seconds.

    It requests each lock itself, because an archiver that is spooling does not wait all the time.
    """
    result: Sequence[LockHolder] = ()
    try:
        with watching(engine) as watch, transaction(engine, lock_seconds=PROBE_SECONDS) as connection:
            result = select_holders(connection)
            for probe in () if result else _PROBES:
                connection.exec_driver_sql(probe)
    except LockTimeoutError:
        result = watch.holders
    except DBAPIError as error:
        if database.sqlstate(error) not in _NOTHING_TO_PROBE:
            raise
    return result


@contextmanager
def watching(engine: Engine) -> Iterator[LockWatch]:
    """Check for lock holders from a thread, twice per second, until the block ends.

    Raises `LockTimeoutError`, with the holder, if a lock is not granted to the block in time.
    """
    watch, ending = LockWatch(), threading.Event()
    watcher = threading.Thread(target=_look, args=(engine, watch, ending), name="locks", daemon=True)
    watcher.start()
    try:
        yield watch
    except DBAPIError as error:
        if not database.is_lock_timeout(error):
            raise
        raise LockTimeoutError(watch.explain()) from error
    finally:
        ending.set()
        watcher.join()


def _look(engine: Engine, watch: LockWatch, ending: threading.Event) -> None:
    own = database.connect(engine.url, pool_size=1, prepared_statements=False)
    try:
        while not ending.wait(SOON_SECONDS):
            try:
                with transaction(own, statement_seconds=CHECK_LIMIT_SECONDS) as connection:
                    result = select_holders(connection, SOON_SECONDS)
            except SQLAlchemyError as error:
                telemetry.commit_failures.labels(database.sqlstate(error) or "none").inc()
                continue
            watch.holders = result or watch.holders
    finally:
        own.dispose()
