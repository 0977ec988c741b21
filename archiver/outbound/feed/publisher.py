"""Run the publisher of one worker: it publishes page after page, and polls when idle.

Every worker has one. A lock in the database lets one publisher work at a time; if it exits, another takes over.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.database import explain, is_cancelled, is_data_error, now, run_async, sqlstate
from archiver.database.identity import ForeignDatabaseError, Guard
from archiver.outbound.feed.publishing import (
    PAGE_CHANGES,
    PAGE_DELETED,
    QUEUE_FULL,
    delete_old,
    publish,
    publish_some,
    select_oldest_sessions,
    select_queue_usage,
)
from archiver.outbound.feed.reading import select_backlog
from archiver.telemetry.duty_health import Duty

log = structlog.get_logger(__name__)

IDLE_SECONDS = 0.3
RETRY_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # without notifications after the queue of Postgres was full
MOSTLY_EMPTY = 0.5  # usage of the notification queue
GAUGE_SECONDS = 5.0


# Statement limits: for a page, for a part of a slow page, and the maximum for the changes of one session.
PAGE_SECONDS, PART_SECONDS, MAX_SESSION_SECONDS = 5.0, 1.0, 30.0
SLOW_RETRY_FACTOR = 10  # pause before the next attempt at slow changes, as a multiple of the time they took


class Slow(msgspec.Struct, frozen=True):
    """The time of the next attempt at the changes of a slow session, and its time limit."""

    due_at: float
    seconds: float


def _is_of_one_session(error: DBAPIError) -> bool:
    """Return whether the rows of one session may have caused the error: a slow statement or a rejected value."""
    return is_cancelled(error) or is_data_error(error)


class Publisher:
    """The publisher of committed changes to the feed. `engine` needs only one connection."""

    def __init__(self, engine: AsyncEngine, duty: Duty | None = None, guard: Guard | None = None) -> None:
        self._engine, self._duty, self._guard = engine, duty or Duty("publish"), guard
        self._fault = ""  # why the last page was not published
        self._slow: dict[str, Slow] = {}  # sessions whose changes took too long
        self._is_silent = False  # because the notification queue is full
        self._notifies_from = 0.0
        self._gauged_at = -GAUGE_SECONDS

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            try:
                published = await self._publish()
                await self._gauge()
            except (SQLAlchemyError, ForeignDatabaseError) as error:
                fault = str(error) if isinstance(error, ForeignDatabaseError) else explain(error)
                self._duty.failing(fault)
                self._log_fault(fault)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._duty.working()
            if self._fault:
                log.info("change publication resumed")
                self._fault = ""
            if published < PAGE_CHANGES:
                # Random, so that workers do not poll at the same moment.
                await asyncio.sleep(IDLE_SECONDS * random.uniform(0.7, 1.3))  # noqa: S311  # it spreads processes and keeps no secret

    async def _publish(self) -> int:
        try:
            published = await self._publish_page()
        except DBAPIError as error:
            if not _is_of_one_session(error):
                raise
            published = await self._isolate()
        published += await self._publish_slow()
        telemetry.published_changes.inc(published)
        return published

    async def _publish_page(self) -> int:
        if self._slow:
            return await self._transact(partial(publish_some, chooses=lambda each: each not in self._slow))
        return await self._transact(publish)

    async def _isolate(self) -> int:
        """Publish the oldest page in parts, to find the session whose changes are slow."""
        sessions = await run_async(self._engine, select_oldest_sessions)
        return await self._publish_part([each for each in sessions if each not in self._slow])

    async def _publish_part(self, sessions: Sequence[str]) -> int:
        middle, published = len(sessions) // 2, 0
        for part in (sessions[:middle], sessions[middle:]) if middle else (sessions,):
            try:
                some = partial(publish_some, chooses=set(part).__contains__)
                published += await self._transact(some, PART_SECONDS) if part else 0
            except DBAPIError as error:
                if not _is_of_one_session(error):
                    raise
                if len(part) > 1:
                    published += await self._publish_part(part)
                else:
                    log.warning(
                        "changes of one session too slow or rejected; publishing other sessions first",
                        reason=explain(error),
                    )
                    self._slow[part[0]] = Slow(monotonic(), PAGE_SECONDS)
        return published

    async def _publish_slow(self) -> int:
        """Publish the changes of one slow session with a longer time limit, if its next attempt is due."""
        began = monotonic()
        due = min(self._slow, key=lambda each: self._slow[each].due_at, default=None)
        if due is None or self._slow[due].due_at > began:
            return 0
        seconds = self._slow[due].seconds
        try:
            published = await self._transact(partial(publish_some, chooses={due}.__contains__), seconds)
        except DBAPIError as error:
            if not _is_of_one_session(error):
                raise
            # Other sessions wait for this attempt, so it is rare.
            self._slow[due] = Slow(began + SLOW_RETRY_FACTOR * seconds, min(2 * seconds, MAX_SESSION_SECONDS))
            return 0
        if not published:
            del self._slow[due]
        return published

    async def _transact(self, work: Callable[..., int], seconds: float = PAGE_SECONDS) -> int:
        notifies = monotonic() >= self._notifies_from
        is_committing = False

        def tracked(connection: Connection) -> int:
            nonlocal is_committing
            is_committing = False
            published: int = work(connection, notifies=notifies)
            is_committing = True
            return published

        try:
            published = await self._run(tracked, seconds)
        except SQLAlchemyError as error:
            # A statement fails with the same SQLSTATE if a row is too large. Only NOTIFY has a limit at the commit.
            if not notifies or not is_committing or sqlstate(error) != QUEUE_FULL:
                raise
            await self._silence_notify()
            published = await self._run(partial(work, notifies=False), seconds)
        else:
            if notifies and published and self._is_silent:
                log.info("NOTIFY resumed")
                self._is_silent = False
        return published

    async def _run(self, work: Callable[[Connection], int], seconds: float) -> int:
        def guarded(connection: Connection) -> int:
            if self._guard is not None:
                self._guard.require(connection)
            return work(connection)

        return await run_async(self._engine, guarded, statement_seconds=seconds)

    async def _silence_notify(self) -> None:
        """Log that an idle listener has filled the queue; while it stays mostly full, suspend NOTIFY."""
        telemetry.notify_failures.inc()
        if await run_async(self._engine, select_queue_usage) > MOSTLY_EMPTY:
            self._notifies_from = monotonic() + SILENCE_SECONDS
        if not self._is_silent:
            log.error(
                "notification queue full; publishing without NOTIFY",
                advice="SELECT pg_notification_queue_usage(); end the idle transaction of the listening session",
            )
        self._is_silent = True

    async def _gauge(self) -> None:
        if monotonic() - self._gauged_at < GAUGE_SECONDS:
            return
        waiting = await run_async(self._engine, select_backlog)
        age = (datetime.now(UTC) - waiting.since).total_seconds() if waiting.since else 0
        telemetry.outbox_transactions.set(waiting.transactions)
        telemetry.outbox_age.set(max(age, 0))  # never negative, even if clocks differ
        self._gauged_at = monotonic()

    def _log_fault(self, fault: str) -> None:
        if not self._fault:
            log.error("change publication failed", reason=fault)
        self._fault = fault

    async def delete_old(self, days: int, consumed: Callable[[Connection], int | None]) -> None:
        """Delete changes older than `days`, page by page.

        `consumed` returns the cursor up to which all consumers have read; None if there is no consumer.
        """
        before, deleted = now() - timedelta(days=days), 0
        while True:
            page = await run_async(
                self._engine, lambda connection: delete_old(connection, before, consumed(connection))
            )
            deleted += page
            if page < PAGE_DELETED:
                break
        if deleted:
            log.info("old changes deleted", changes=deleted, days=days)
