"""Run all follow-ups of one worker: one sender per active subscription, and the pruning of old rows."""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from functools import partial
from time import monotonic
from typing import TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, telemetry
from archiver.database import run_async, run_split_async
from archiver.database.identity import ForeignDatabaseError, Guard
from archiver.outbound.followups import pruning, review, subscriptions
from archiver.outbound.followups.deferred import STATEMENT_SECONDS, Lanes
from archiver.outbound.followups.payloads import SelectSeal
from archiver.outbound.followups.rate_limit import RateLimiter
from archiver.outbound.followups.sender import DATABASE_SECONDS, Sender, part_of
from archiver.settings import Settings
from archiver.telemetry.duty_health import Duty, fault_location

T = TypeVar("T")

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.25
HOUSEKEEPING_SECONDS = 1.0
GAUGE_SECONDS = 10.0  # between two updates of the gauges
PRUNE_SECONDS = 60.0
STUCK_SECONDS = 3_600.0  # after which the deletion of locked or slow deliveries is retried
PRUNE_MAX_PAGES = 20  # per run
END_SECONDS = 5.0  # for deliveries in flight
CONNECTIONS = 4  # connections to Postgres: a cycle of a sender needs one for some milliseconds, slow work at most two
_UNAVAILABLE = (DBAPIError, PoolTimeoutError, TimeoutError)


class Followups:
    """The follow-ups of one worker. Across machines, one sender at a time serves a subscription."""

    def __init__(
        self,
        configuration: Settings,
        engine: AsyncEngine,
        select_seal: SelectSeal,
        duty: Duty | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._engine, self._guard, self._select_seal = engine, guard, select_seal
        self._duty = duty or Duty("followups")
        self._days = configuration.followups_days
        self._allow_private = configuration.followups_allow_private
        self._pace = RateLimiter(configuration.followups_rate)
        self._lanes = Lanes()
        self._owner = subscriptions.new_owner()
        self._senders: dict[int, Sender] = {}
        self._sending: dict[int, asyncio.Task[None]] = {}
        self._gauged_at = self._forgot_at = float("-inf")
        self._stuck: list[pruning.Key] = []
        self._stuck_at = float("-inf")
        self._is_away = False

    async def run(self, ending: asyncio.Event) -> None:
        """Run until `ending` is set. Deliveries in flight get some seconds to finish; others are sent again."""
        housekeeping = asyncio.create_task(self._housekeeping())
        try:
            while not ending.is_set():
                await self._start_senders(ending)
                if housekeeping.done():
                    housekeeping.result()  # raises
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), POLL_SECONDS)
        finally:
            housekeeping.cancel()
            await asyncio.wait({housekeeping})
            await self._end()

    async def _housekeeping(self) -> None:
        """Update gauges and prune, independently of the senders."""
        while True:
            for task in (self._update_gauges, self._prune):
                try:
                    await task()
                except _UNAVAILABLE as error:
                    telemetry.followup_waits.inc()
                    log.warning("database unavailable; follow-up housekeeping waits", reason=database.explain(error))
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    async def _start_senders(self, ending: asyncio.Event) -> None:
        try:
            for subscription_id in await self._do(self._select_busy):
                self._start(subscription_id, ending)
        except _UNAVAILABLE as error:
            telemetry.followup_waits.inc()
            if not self._is_away:
                log.warning("database unavailable; follow-ups wait", reason=database.explain(error))
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
                select_seal=self._select_seal,
                guard=self._guard,
                lanes=self._lanes,
                duty=self._duty,
            )
        drain = self._senders[subscription_id].drain(ending)
        self._sending[subscription_id] = asyncio.create_task(drain)

    def _reap(self, subscription_id: int) -> None:
        """Remove a finished sender, which may then start again; if it failed, log its defect."""
        ended = self._sending.pop(subscription_id)
        error = None if ended.cancelled() else ended.exception()
        part = part_of(subscription_id)
        if error is None:
            self._duty.working(part)
        else:
            self._duty.failing(f"{part}: {type(error).__name__} at {fault_location(error)}", part)
            telemetry.followup_waits.inc()
            trace = (type(error), error, error.__traceback__)
            log.error("follow-up sender failed; restarting", subscription=subscription_id, exc_info=trace)

    async def _update_gauges(self) -> None:
        if monotonic() - self._gauged_at < GAUGE_SECONDS:
            return
        stats = await self._do(review.select_stats)
        self._gauged_at = monotonic()
        telemetry.followup_oldest.set(stats.oldest_seconds)
        telemetry.followup_pending.set(stats.pending)
        telemetry.followup_paused.set(stats.paused)
        telemetry.followup_failing.set(stats.failing)
        known = await self._do(subscriptions.select_ids)
        for ended in self._senders.keys() - known - self._sending.keys():
            await self._senders.pop(ended).aclose()
            self._duty.working(part_of(ended))  # otherwise its last fault would stay

    async def _prune(self) -> None:
        if monotonic() - self._forgot_at < PRUNE_SECONDS:
            return
        self._forgot_at = monotonic()
        if self._forgot_at - self._stuck_at > STUCK_SECONDS:
            self._stuck, self._stuck_at = [], self._forgot_at
        for select in (partial(pruning.select_ended, days=self._days), pruning.select_removed):
            for _ in range(PRUNE_MAX_PAGES):
                keys = await self._do(partial(select, but=self._stuck))
                _, stuck = await run_split_async(
                    self._engine, keys, pruning.delete_deliveries, statement_seconds=STATEMENT_SECONDS
                )
                if stuck:
                    log.warning("old deliveries locked or slow; pruning skipped", deliveries=len(stuck))
                self._stuck += stuck
                if len(keys) < pruning.BATCH_SIZE or len(self._stuck) >= pruning.BATCH_SIZE:
                    break

    async def _do(self, work: Callable[[Connection], T]) -> T:
        return await run_async(self._engine, work, DATABASE_SECONDS)

    async def _end(self) -> None:
        if self._sending:
            _, late = await asyncio.wait(self._sending.values(), timeout=END_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._sending.values(), return_exceptions=True)
        for sender in self._senders.values():
            await sender.aclose()
