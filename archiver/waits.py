"""Waits for locks: which session holds the lock that the archiver waits for, in the log, in metrics and in errors.

Postgres says who blocks a wait only while it lasts, so that a connection of its own looks meanwhile.
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
from archiver.database import explain, run_in_transaction, transaction
from archiver.database.locks import Holder, Lock, select_holders
from archiver.duties import Duty

log = structlog.get_logger(__name__)

LOOK_SECONDS = 5.0  # between two looks of a process that goes on for long
LOOK_LIMIT_SECONDS = 3.0  # for a look
SOON_SECONDS = 0.5  # between two looks of a command
REPORT_SECONDS = 60.0
MOST_REPORTED = 3
PROBE_SECONDS = 2.0  # for a lock
INSUFFICIENT_PRIVILEGE = "42501"  # SQLSTATE


class LockedError(Exception):
    """A lock was not free for as long as a transaction may wait; the text names its holder."""


class Report:
    """One log line a minute for each session that holds a lock that others wait for; the first line at once."""

    def __init__(self) -> None:
        self._reported_at = -REPORT_SECONDS

    def add(self, holders: Sequence[Holder]) -> None:
        """What a look found."""
        telemetry.lock_waiters.set(sum(each.waiting for each in holders))
        if not holders or monotonic() - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at = monotonic()
        for each in holders[:MOST_REPORTED]:
            log.warning(
                "waiting for a lock that another session holds",
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
    """Look every few seconds, until cancelled, for sessions that hold up the archiver. Uses one connection."""
    report, duty = Report(), duty or Duty("locks")
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            report.add(await run_in_transaction(engine, select_holders, LOOK_LIMIT_SECONDS))
        except (SQLAlchemyError, TimeoutError) as error:
            duty.failing(f"database: {explain(error)}")
        else:
            duty.working()


class Watch:
    """The sessions that held a lock at the last look that found any."""

    def __init__(self) -> None:
        self.holders: Sequence[Holder] = ()
        self.report = Report()

    def explain(self) -> str:
        """A sentence that names the first of them, and what to do."""
        if not self.holders:
            return "Another session holds a lock that is needed: `archiver doctor` names it."
        first = self.holders[0]
        return f"Another session holds a lock that is needed: {first}.\n{first.advice}"


# Each as a writer of the archive takes it; nothing is changed.
_WRITTEN = ("events", "sessions", "chats", "messages", "outbox")
_PROBES = (
    *(f"LOCK TABLE archiver_jobs.{lock} IN ROW EXCLUSIVE MODE" for lock in Lock),
    *(f"DELETE FROM archiver.{name} WHERE false" for name in _WRITTEN),  # noqa: S608  # names of ours
)


_NOTHING_TO_PROBE = {INSUFFICIENT_PRIVILEGE, "42P01", "3F000"}  # a user who only reads; no such table, no such schema


def find_holders(engine: Engine) -> Sequence[Holder]:
    """The sessions that keep others waiting, or would keep a writer waiting that came now. Takes some seconds.

    An archiver that spools meanwhile does not wait all the time.
    """
    found: Sequence[Holder] = ()
    try:
        with watching(engine) as watch, transaction(engine, lock_seconds=PROBE_SECONDS) as connection:
            found = select_holders(connection)
            for probe in () if found else _PROBES:
                connection.exec_driver_sql(probe)
    except LockedError:
        found = watch.holders
    except DBAPIError as error:
        if database.sqlstate(error) not in _NOTHING_TO_PROBE:
            raise
    return found


@contextmanager
def watching(engine: Engine) -> Iterator[Watch]:
    """Look from a thread with a connection of its own, if the block takes its time.

    A lock that the block waits for in vain is a `LockedError`.
    """
    watch, ending = Watch(), threading.Event()
    watcher = threading.Thread(target=_look, args=(engine, watch, ending), name="locks", daemon=True)
    watcher.start()
    try:
        yield watch
    except DBAPIError as error:
        if not database.is_lock_timeout(error):
            raise
        raise LockedError(watch.explain()) from error
    finally:
        ending.set()
        watcher.join()


def _look(engine: Engine, watch: Watch, ending: threading.Event) -> None:
    own = database.connect(engine.url, pool_size=1, prepared_statements=False)
    try:
        while not ending.wait(SOON_SECONDS):
            try:
                with transaction(own, statement_seconds=LOOK_LIMIT_SECONDS) as connection:
                    found = select_holders(connection, SOON_SECONDS)
            except SQLAlchemyError as error:
                telemetry.commit_failures.labels(database.sqlstate(error) or "none").inc()
                continue
            watch.holders = found or watch.holders
    finally:
        own.dispose()
