"""Defer slow work of one subscription; each item is retried separately with more time.

Deferred work is not stored: after a restart the deliveries are sent again, and the feed is read again from the cursor
of the subscription, which does not pass deferred changes.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, telemetry
from archiver.database import run_async

log = structlog.get_logger(__name__)

LOCK_SECONDS, STATEMENT_SECONDS = 0.5, 2.0  # for work that runs while others wait
SINGLE_LOCK_SECONDS, SINGLE_STATEMENT_SECONDS = 2.0, 30.0
SINGLE_SECONDS = 60.0  # per transaction
INITIAL_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 60.0
MAX_DEFERRED = 500  # items per subscription; with more, the subscription waits

Reason = Literal["locked", "too_slow"]
Key = tuple[str, tuple[int | str, ...]]


def slow(error: BaseException) -> Reason | None:
    """Return the reason why the work was slow, so that a retry may succeed; None for other errors."""
    if database.is_lock_timeout(error):
        return "locked"
    return "too_slow" if database.is_cancelled(error) else None


class Lanes:
    """The semaphores of one process that keep connections free while deferred work runs.

    `short`: for subscriptions whose row is slow, and for the first attempt at each item; `alone`: for further
    attempts.
    """

    def __init__(self) -> None:
        self.short, self.alone = asyncio.Semaphore(1), asyncio.Semaphore(1)


class DeferredWork(ABC):
    """An item of deferred work. Of several items with the same `key`, only one is deferred."""

    key: Key

    @abstractmethod
    def run(self, connection: Connection) -> int:
        """Do the work, or the next part of it, in this transaction; return a result for `succeeded`."""

    @abstractmethod
    def succeeded(self, answer: int) -> bool:
        """Process the result of `run` after the commit; return whether the item is complete."""

    @abstractmethod
    def divided(self) -> Sequence["DeferredWork"]:
        """Return smaller items that replace this one; empty if it cannot be divided."""


class DeferredQueue:
    """The deferred work of one subscription, and the tasks that run it."""

    def __init__(self, subscription_id: int, engine: AsyncEngine, lanes: Lanes) -> None:
        self._id, self._engine, self._lanes = subscription_id, engine, lanes
        self._tasks: dict[Key, asyncio.Task[Sequence[DeferredWork]]] = {}

    @property
    def keys(self) -> Sequence[Key]:
        """Return the keys of incomplete items."""
        return list(self._tasks)

    @property
    def is_full(self) -> bool:
        """Return whether the maximum number of items is deferred."""
        return len(self._tasks) >= MAX_DEFERRED

    def add(self, work: DeferredWork, reason: Reason) -> None:
        """Run the work separately until it succeeds, with increasing pauses."""
        if work.key in self._tasks:
            return
        telemetry.followup_set_aside.labels(reason).inc()
        log.warning("follow-up work deferred", subscription=self._id, reason=reason, of=work.key[0])
        self._start(work)

    async def aclose(self) -> None:
        """Cancel unfinished work."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: DeferredWork) -> None:
        task = asyncio.create_task(self._until_done(work))
        self._tasks[work.key] = task
        telemetry.followup_aside.inc()
        task.add_done_callback(lambda ended: self._ended(work, ended))

    async def _until_done(self, work: DeferredWork) -> Sequence[DeferredWork]:
        """Run the work until it is complete; return the items that replace it, if any."""
        parts, pause = work.divided(), INITIAL_PAUSE_SECONDS
        is_short = True  # the first attempt may be quick, so it does not wait behind slow attempts
        while True:
            try:
                if work.succeeded(await self._run(work, is_short=is_short)):
                    return ()
                is_short, pause = True, INITIAL_PAUSE_SECONDS
                continue
            except (DBAPIError, PoolTimeoutError, TimeoutError) as error:
                telemetry.followup_waits.inc()
                if parts and slow(error):
                    return parts
                is_short = bool(parts)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    async def _run(self, work: DeferredWork, *, is_short: bool) -> int:
        lane = self._lanes.short if is_short else self._lanes.alone
        limits = (LOCK_SECONDS, STATEMENT_SECONDS) if is_short else (SINGLE_LOCK_SECONDS, SINGLE_STATEMENT_SECONDS)
        async with lane:
            return await run_async(
                self._engine, work.run, SINGLE_SECONDS, lock_seconds=limits[0], statement_seconds=limits[1]
            )

    def _ended(self, work: DeferredWork, ended: asyncio.Task[Sequence[DeferredWork]]) -> None:
        del self._tasks[work.key]
        telemetry.followup_aside.dec()
        if ended.cancelled():
            return
        if (error := ended.exception()) is None:
            for each in ended.result():
                self._start(each)
            return
        telemetry.followup_defects.inc()
        trace = (type(error), error, error.__traceback__)
        log.error("deferred follow-up work failed", subscription=self._id, exc_info=trace)
