"""All follow-ups of one worker: looks for work, lets each subscription's sender do it, and forgets what is old."""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from functools import partial
from time import monotonic
from typing import TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from archiver import database, telemetry
from archiver.database import run_apart, run_in_transaction
from archiver.duties import Duty, where
from archiver.followups import forgetting, review, subscriptions
from archiver.followups.aside import STATEMENT_SECONDS, Lanes
from archiver.followups.pace import Pace
from archiver.followups.sender import DATABASE_SECONDS, Sender
from archiver.identity import ForeignDatabaseError, Guard
from archiver.settings import Settings

T = TypeVar("T")

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.25
CARE_SECONDS = 1.0
TELL_SECONDS = 10.0  # between two looks at how follow-ups stand
FORGET_SECONDS = 60.0
STUCK_SECONDS = 3_600.0  # after which deliveries that could not be forgotten are tried again
FORGET_MOST = 20  # steps at a time
END_SECONDS = 5.0  # for deliveries under way
CONNECTIONS = 4  # to Postgres: each turn of a sender takes one for some milliseconds, slow work at most two
_AWAY = (DBAPIError, PoolTimeoutError, TimeoutError)


class Followups:
    """Run it beside other work, on as many machines as one likes: each subscription is served by one at a time."""

    def __init__(
        self, configuration: Settings, url: URL, duty: Duty | None = None, guard: Guard | None = None
    ) -> None:
        self._guard = guard
        self._duty = duty or Duty("followups")
        self._days = configuration.followups_days
        self._allow_private = configuration.followups_allow_private
        self._pace = Pace(configuration.followups_rate)
        self._engine = database.connect_async(
            url, pool_size=CONNECTIONS, prepared_statements=configuration.prepared_statements
        )
        self._lanes = Lanes()
        self._owner = subscriptions.new_owner()
        self._senders: dict[int, Sender] = {}
        self._sending: dict[int, asyncio.Task[None]] = {}
        self._told_at = self._forgot_at = float("-inf")
        self._stuck: list[forgetting.Key] = []
        self._stuck_at = float("-inf")
        self._is_away = False

    async def run(self, ending: asyncio.Event) -> None:
        """Until told; deliveries under way get a moment to end. What is cut off is sent again by whoever is next."""
        caring = asyncio.create_task(self._care())
        try:
            while not ending.is_set():
                await self._look(ending)
                if caring.done():
                    caring.result()  # raises
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), LOOK_SECONDS)
        finally:
            caring.cancel()
            await asyncio.wait({caring})
            await self._end()

    async def _care(self) -> None:
        """Report and forget, beside the senders: neither waits for a row that is slow."""
        while True:
            for task in (self._tell, self._forget):
                try:
                    await task()
                except _AWAY as error:
                    telemetry.followup_waits.inc()
                    log.warning("upkeep of follow-ups waits for the database", reason=database.explain(error))
            await asyncio.sleep(CARE_SECONDS)

    async def _look(self, ending: asyncio.Event) -> None:
        try:
            for subscription_id in await self._do(self._select_busy):
                self._start(subscription_id, ending)
        except _AWAY as error:
            telemetry.followup_waits.inc()
            if not self._is_away:
                log.warning("follow-ups wait for the database", reason=database.explain(error))
            self._is_away = True
            self._duty.failing(database.explain(error))
        except ForeignDatabaseError as error:
            self._duty.failing(str(error))
            for task in self._sending.values():
                task.cancel()
        else:
            self._is_away = False
            self._duty.working()
        for subscription_id in [each for each, task in self._sending.items() if task.done()]:
            self._reap(subscription_id)

    def _select_busy(self, connection: Connection) -> Collection[int]:
        if self._guard is not None:
            self._guard.require(connection)
        return subscriptions.select_busy(connection, owner=self._owner)

    def _start(self, subscription_id: int, ending: asyncio.Event) -> None:
        if subscription_id in self._sending:
            return
        if subscription_id not in self._senders:
            self._senders[subscription_id] = Sender(
                subscription_id,
                self._engine,
                self._pace,
                self._owner,
                allow_private=self._allow_private,
                guard=self._guard,
                lanes=self._lanes,
            )
        drain = self._senders[subscription_id].drain(ending)
        self._sending[subscription_id] = asyncio.create_task(drain)

    def _reap(self, subscription_id: int) -> None:
        """A defect in what is sent to one subscription must not end what is sent to the others, nor hide."""
        ended = self._sending.pop(subscription_id)
        error = None if ended.cancelled() else ended.exception()
        part = f"subscription {subscription_id}"
        if error is None:
            self._duty.working(part)
        else:
            self._duty.failing(f"{part}: {type(error).__name__} at {where(error)}", part)
            telemetry.followup_waits.inc()
            trace = (type(error), error, error.__traceback__)
            log.error("a sender failed and is started again", subscription=subscription_id, exc_info=trace)

    async def _tell(self) -> None:
        if monotonic() - self._told_at < TELL_SECONDS:
            return
        standing = await self._do(review.select_standing)
        self._told_at = monotonic()
        telemetry.followup_oldest.set(standing.oldest_seconds)
        telemetry.followup_pending.set(standing.pending)
        telemetry.followup_paused.set(standing.paused)
        telemetry.followup_failing.set(standing.failing)
        known = await self._do(subscriptions.select_ids)
        for gone in self._senders.keys() - known - self._sending.keys():
            await self._senders.pop(gone).aclose()

    async def _forget(self) -> None:
        if monotonic() - self._forgot_at < FORGET_SECONDS:
            return
        self._forgot_at = monotonic()
        if self._forgot_at - self._stuck_at > STUCK_SECONDS:
            self._stuck, self._stuck_at = [], self._forgot_at
        for select in (partial(forgetting.select_ended, days=self._days), forgetting.select_removed):
            for _ in range(FORGET_MOST):
                keys = await self._do(partial(select, but=self._stuck))
                _, stuck = await run_apart(self._engine, keys, forgetting.forget, statement_seconds=STATEMENT_SECONDS)
                if stuck:
                    log.warning("deliveries are locked or slow and cannot be forgotten now", deliveries=len(stuck))
                self._stuck += stuck
                if len(keys) < forgetting.AT_ONCE or len(self._stuck) >= forgetting.AT_ONCE:
                    break

    async def _do(self, work: Callable[[Connection], T]) -> T:
        return await run_in_transaction(self._engine, work, DATABASE_SECONDS)

    async def _end(self) -> None:
        if self._sending:
            _, late = await asyncio.wait(self._sending.values(), timeout=END_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._sending.values(), return_exceptions=True)
        for sender in self._senders.values():
            await sender.aclose()
        await self._engine.dispose()
