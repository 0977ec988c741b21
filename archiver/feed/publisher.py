"""The publisher of one worker: page after page while there are any, and a look now and then when there is none.

Every worker has one; a lock in the database lets one at a time publish, and whoever dies is followed by another.
"""

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.database import explain, now, run_in_transaction, sqlstate
from archiver.duties import Duty
from archiver.feed.publishing import PAGE_CHANGES, QUEUE_FULL, publish, select_queue_usage
from archiver.feed.reading import select_waiting
from archiver.feed.retention import PAGE, delete_old

log = structlog.get_logger(__name__)

IDLE_SECONDS = 0.3
FAULT_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # without notifications, once Postgres had no room for them
MOSTLY_EMPTY = 0.5  # of the queue of notifications
GAUGE_SECONDS = 5.0


class Publisher:
    """Publishes changes for as long as it runs. `engine`: one connection of its own is enough."""

    def __init__(self, engine: AsyncEngine, duty: Duty | None = None) -> None:
        self._engine, self._duty = engine, duty or Duty("publish")
        self._fault = ""  # why the last page was not published
        self._is_silent = False  # for want of room for notifications
        self._notifies_from = 0.0
        self._gauged_at = -GAUGE_SECONDS

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                published = await self._publish()
                await self._gauge()
            except SQLAlchemyError as error:
                self._duty.failing(explain(error))
                self._tell(explain(error))
                await asyncio.sleep(FAULT_SECONDS)
                continue
            self._duty.working()
            if self._fault:
                log.info("changes are published again")
                self._fault = ""
            if published < PAGE_CHANGES:
                # Not in step with other workers.
                await asyncio.sleep(IDLE_SECONDS * random.uniform(0.7, 1.3))  # noqa: S311

    async def _publish(self) -> int:
        notifies = monotonic() >= self._notifies_from
        try:
            published = await run_in_transaction(self._engine, partial(publish, notifies=notifies))
        except SQLAlchemyError as error:
            if not notifies or sqlstate(error) != QUEUE_FULL:
                raise
            await self._be_silent()
            published = await run_in_transaction(self._engine, partial(publish, notifies=False))
        else:
            if notifies and published and self._is_silent:
                log.info("NOTIFY works again")
                self._is_silent = False
        telemetry.published_changes.inc(published)
        return published

    async def _be_silent(self) -> None:
        """Nobody is to wait for the feed because somebody who listens is asleep."""
        telemetry.notify_failures.inc()
        if await run_in_transaction(self._engine, select_queue_usage) > MOSTLY_EMPTY:
            self._notifies_from = monotonic() + SILENCE_SECONDS
        if not self._is_silent:
            log.error(
                "Postgres has no room for notifications: changes are published without NOTIFY",
                advice="SELECT pg_notification_queue_usage(); and end the transaction of who listens and sleeps",
            )
        self._is_silent = True

    async def _gauge(self) -> None:
        if monotonic() - self._gauged_at < GAUGE_SECONDS:
            return
        waiting = await run_in_transaction(self._engine, select_waiting)
        age = (datetime.now(UTC) - waiting.since).total_seconds() if waiting.since else 0
        telemetry.outbox_transactions.set(waiting.transactions)
        telemetry.outbox_age.set(max(age, 0))  # clocks differ
        self._gauged_at = monotonic()

    def _tell(self, fault: str) -> None:
        if not self._fault:
            log.error("changes are not published", reason=fault)
        self._fault = fault

    async def delete_old(self, days: int, consumed: Callable[[Connection], int | None]) -> None:
        """Delete the changes that are so many days old, a page at a time.

        `consumed` answers up to which cursor whoever must see each change has; None: nobody must.
        """
        before, deleted = now() - timedelta(days=days), 0
        while True:
            page = await run_in_transaction(
                self._engine, lambda connection: delete_old(connection, before, consumed(connection))
            )
            deleted += page
            if page < PAGE:
                break
        if deleted:
            log.info("old changes were deleted", changes=deleted, days=days)
