"""Send the deliveries of one subscription: claim, commit, send, settle; a slow receiver does not delay the others.

A cycle is one short transaction: it records the last results, renews the lease and reads the next deliveries with
their content; if few are left, it also reads more of the feed. Sending happens between cycles.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, telemetry
from archiver.database import Lock, run_async
from archiver.database.identity import Guard
from archiver.outbound.followups import deliveries, subscriptions
from archiver.outbound.followups.deferred import (
    LOCK_SECONDS,
    MAX_DEFERRED,
    STATEMENT_SECONDS,
    DeferredQueue,
    DeferredWork,
    Lanes,
    Reason,
    slow,
)
from archiver.outbound.followups.deliveries import Due, Result
from archiver.outbound.followups.fanout import MAX_PENDING
from archiver.outbound.followups.guard import AddressRefusedError, endpoint
from archiver.outbound.followups.payloads import SelectSeal, select_bodies
from archiver.outbound.followups.rate_limit import RateLimiter
from archiver.outbound.followups.reader import POLL_SECONDS, Position, Reader
from archiver.outbound.followups.schedule import OPEN_AFTER_FAILURES, PAUSE_AFTER, probe_after
from archiver.outbound.followups.sending import GONE, Attempt, Transport
from archiver.outbound.followups.subscriptions import Subscription
from archiver.telemetry.duty_health import Duty

log = structlog.get_logger(__name__)

FRESH_SECONDS = 2.0  # content older than this is read again before it is sent, because it may have been erased
AHEAD = 4  # deliveries read in advance, as a multiple of the concurrency
RENEW_SECONDS = 5.0  # interval of lease renewal; the lease lasts longer
LINGER_SECONDS = 0.02  # time to collect results for one transaction
PAGES = 5  # pages of the feed per transaction
DATABASE_SECONDS = 20.0
# while the database is unavailable, or the row of the subscription is locked
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 5.0
RESULTS = "results"
RESULTS_SPLIT = 8  # parts into which results are divided that cannot be recorded together
_OVERLOADED = frozenset({429, 503})


class ReadyDelivery(msgspec.Struct, frozen=True):
    """A delivery with its body, read from the archive at `read_at` on this process's clock."""

    due: Due
    body: bytes
    read_at: float


class SendCycle(msgspec.Struct, frozen=True):
    """The result of a cycle. `subscription` is None without a lease; `has_more`: the feed may contain more.

    `position`: the position in the feed. `unrecorded`: why results could not be recorded in time.
    """

    subscription: Subscription | None
    claimed: tuple[tuple[Due, bytes], ...] = ()
    has_more: bool = False
    missed: int = 0
    position: Position | None = None
    unrecorded: Reason | None = None


class RecordResults(DeferredWork):
    """Results that could not be recorded in time; their deliveries are not sent again until they are recorded."""

    def __init__(self, subscription_id: int, results: Sequence[Result]) -> None:
        self.key = (RESULTS, tuple(each.due.cursor for each in results))
        self._id, self._results = subscription_id, results

    def run(self, connection: Connection) -> int:
        """Record the results."""
        Lock.RECORDING.take(connection, exclusive=False)
        deliveries.record_results(connection, self._id, self._results)
        return len(self._results)

    def succeeded(self, answer: int) -> bool:
        """Return True, because one run records all results."""
        return answer == len(self._results)

    def divided(self) -> Sequence[DeferredWork]:
        """Return the results split into smaller items; empty for a single result."""
        size = max(1, len(self._results) // RESULTS_SPLIT)
        starts = range(0, len(self._results), size) if len(self._results) > 1 else ()
        return [RecordResults(self._id, self._results[start : start + size]) for start in starts]


class Sender:
    """The sender of the deliveries of one subscription. `owner` names the lease holder."""

    def __init__(
        self,
        subscription_id: int,
        engine: AsyncEngine,
        pace: RateLimiter,
        owner: str,
        *,
        allow_private: bool,
        select_seal: SelectSeal,
        guard: Guard | None = None,
        lanes: Lanes | None = None,
        duty: Duty | None = None,
    ) -> None:
        self._guard = guard
        self._duty = duty or Duty("followups")
        self._lanes = lanes or Lanes()
        self._deferred = DeferredQueue(subscription_id, engine, self._lanes)
        self._reader = Reader(self._deferred)
        self._is_slow = False  # the row of the subscription is slow, so a cycle waits for the lane of short work
        self._id, self._engine, self._pace, self._owner = subscription_id, engine, pace, owner
        self._allow_private, self._select_seal = allow_private, select_seal
        self._transport: Transport | None = None
        self._slots = asyncio.Semaphore(1)
        self._must_wait = False  # because of its receiver, or because another sender has the lease

    async def aclose(self) -> None:
        """Close the connections and cancel deferred work."""
        await self._deferred.aclose()
        if self._transport is not None:
            await self._transport.aclose()

    async def drain(self, ending: asyncio.Event) -> None:
        """Send due deliveries until none is left or `ending` is set, and record the results of those in flight."""
        under_way: dict[asyncio.Task[Result | None], Due] = {}
        results: list[Result] = []
        try:
            while True:
                cycle = await self._run_cycle(results, list(under_way.values()), is_ending=ending.is_set())
                results = []
                leased = cycle.subscription
                self._must_wait = leased is None or leased.open_seconds > 0
                self._begin(cycle, under_way)
                if not under_way:
                    if cycle.subscription is None or ending.is_set() or not cycle.has_more:
                        return
                    continue
                results = await _ended(under_way)
        finally:
            for task in under_way:
                task.cancel()

    def _begin(self, cycle: SendCycle, under_way: dict[asyncio.Task[Result | None], Due]) -> None:
        if cycle.subscription is None:
            return
        if cycle.missed:
            log.error(
                "changes deleted from the feed before delivery",
                subscription=self._id,
                changes=cycle.missed,
            )
        now = monotonic()
        for due, body in cycle.claimed:
            sending = self._send(self._connect(cycle.subscription), cycle.subscription, ReadyDelivery(due, body, now))
            under_way[asyncio.create_task(sending)] = due

    def _connect(self, subscription: Subscription) -> Transport | None:
        """Return the transport; None if the URL is not accepted."""
        if self._transport is None:
            try:
                where = endpoint(subscription.url)
            except AddressRefusedError:
                return None
            limit = subscription.concurrency
            self._transport = Transport(where, concurrency=limit, allow_private=self._allow_private)
            self._slots = asyncio.Semaphore(limit)
        return self._transport

    async def _send(
        self, transport: Transport | None, subscription: Subscription, ready: ReadyDelivery
    ) -> Result | None:
        """Send one delivery. Return None if it must be read again.

        That is the case if its content is too old, the rate limit delays it for too long, or the sender must wait.
        """
        async with self._slots:
            is_old = monotonic() - ready.read_at > FRESH_SECONDS
            if is_old or not await self._pace.acquire() or self._must_wait:
                return None
            if transport is None:
                return Result(ready.due, Attempt.refused())
            attempt = await transport.send(subscription, ready.due.message_id, ready.body)
            if attempt.status == GONE or (attempt.status in _OVERLOADED and attempt.retry_after):
                self._must_wait = True
        result = Result(ready.due, attempt)
        telemetry.followup_seconds.observe(attempt.seconds)
        telemetry.followup_attempts.labels("failed" if result.state == "pending" else result.state).inc()
        return result

    async def _run_cycle(self, results: Sequence[Result], under_way: Sequence[Due], *, is_ending: bool) -> SendCycle:
        """Run a cycle; it is retried until the results, which only this process has, are recorded or deferred."""
        is_logged, pause = False, RETRY_SECONDS
        while True:
            try:
                cycle = await self._run(results, under_way, is_ending=is_ending)
            except (DBAPIError, PoolTimeoutError, TimeoutError) as error:
                if is_ending:
                    raise
                self._is_slow = slow(error) is not None
                telemetry.followup_waits.inc()
                reason = database.explain(error)
                if not self._is_slow:
                    self._duty.failing(f"{part_of(self._id)}: {reason}", part_of(self._id))
                if not is_logged:
                    log.error("database unavailable; subscription waits", subscription=self._id, reason=reason)  # noqa: TRY400  # there is nothing to trace
                is_logged = True
            else:
                self._is_slow = False
                self._duty.working(part_of(self._id))
                self._defer(cycle, results)
                return cycle
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    async def _run(self, results: Sequence[Result], under_way: Sequence[Due], *, is_ending: bool) -> SendCycle:
        self._reader.begin()
        async with self._lanes.short if self._is_slow else contextlib.nullcontext():
            return await run_async(
                self._engine,
                lambda connection: self._settle(connection, results, under_way, is_ending=is_ending),
                DATABASE_SECONDS,
                statement_seconds=STATEMENT_SECONDS,
                lock_seconds=LOCK_SECONDS,
            )

    def _defer(self, cycle: SendCycle, results: Sequence[Result]) -> None:
        if cycle.unrecorded is not None:
            self._deferred.add(RecordResults(self._id, results), cycle.unrecorded)
        if cycle.position is not None and cycle.subscription is not None:
            self._reader.commit(cycle.subscription, cycle.position)

    def _settle(
        self, connection: Connection, results: Sequence[Result], under_way: Sequence[Due], *, is_ending: bool
    ) -> SendCycle:
        if self._guard is not None and self._guard.reason(connection):
            return SendCycle(None)
        unrecorded = self._record(connection, results)
        leased = subscriptions.lease(connection, self._id, self._owner)
        if leased is None:
            return SendCycle(None, unrecorded=unrecorded)
        judged = self._judge(connection, leased, results)
        if judged is None:
            return SendCycle(None, unrecorded=unrecorded)
        cycle = (
            SendCycle(judged)
            if is_ending
            else self._next(connection, judged, under_way, results if unrecorded else ())
        )
        if not cycle.claimed and not under_way and not cycle.has_more and not self._deferred.keys and not unrecorded:
            subscriptions.release(connection, self._id, self._owner)
        return msgspec.structs.replace(cycle, unrecorded=unrecorded)

    def _record(self, connection: Connection, results: Sequence[Result]) -> Reason | None:
        """Record the results; if that takes too long, record nothing and return the reason."""
        if not results:
            return None
        try:
            with connection.begin_nested():
                Lock.RECORDING.take(connection, exclusive=False)  # blocks a concurrent erasure
                deliveries.record_results(connection, self._id, results)
        except DBAPIError as error:
            if (reason := slow(error)) is None:
                raise
            return reason
        return None

    def _judge(self, connection: Connection, leased: Subscription, results: Sequence[Result]) -> Subscription | None:
        """Count consecutive failures, and return the subscription; None if it is paused now."""
        if not results:
            return leased
        failures, wait = leased.failures, 0.0
        for each in results:
            failures = 0 if each.attempt.fault is None else failures + 1
            if each.attempt.status in _OVERLOADED:
                wait = max(wait, each.attempt.retry_after or 0.0)
        # Deliveries in flight when the circuit opened do not count; from then on each probe counts.
        probes = 0 if leased.open_seconds > 0 else 1
        failures = min(failures, max(leased.failures + probes, OPEN_AFTER_FAILURES))
        is_gone = any(each.attempt.status == GONE for each in results)
        if failures == leased.failures == 0 and not wait and not is_gone:
            return leased
        subscriptions.set_circuit(connection, self._id, failures, max(wait, probe_after(failures)))
        judged = subscriptions.lease(connection, self._id, self._owner)  # its present state
        is_lost = judged is not None and judged.failing_seconds > PAUSE_AFTER.total_seconds()
        if not is_gone and not is_lost:
            return judged
        reason = subscriptions.GONE if is_gone else subscriptions.FAILING
        subscriptions.release(connection, self._id, self._owner)
        subscriptions.pause(connection, self._id, reason)
        log.error("subscription paused", subscription=self._id, reason=reason)
        return None

    def _next(
        self, connection: Connection, leased: Subscription, under_way: Sequence[Due], unrecorded: Sequence[Result]
    ) -> SendCycle:
        if leased.open_seconds > 0:
            return SendCycle(leased)
        is_probe = leased.failures >= OPEN_AFTER_FAILURES
        free_slots = (1 if is_probe else leased.concurrency * AHEAD) - len(under_way)
        if free_slots <= 0 or self._deferred.is_full:
            return SendCycle(leased)
        busy = [each.cursor for each in under_way] + [each.due.cursor for each in unrecorded]
        deferred = (cursors for kind, cursors in self._deferred.keys if kind == RESULTS)
        busy += [cursor for cursors in deferred for cursor in cursors if isinstance(cursor, int)]
        result = self._select(connection, leased, busy, free_slots)
        position, missed, is_behind = self._reader.start(connection, leased), 0, False
        began = monotonic()
        for _ in range(PAGES):
            room = MAX_PENDING - deliveries.count_pending(connection, self._id, MAX_PENDING)
            if len(result) >= free_slots or room == 0 or len(position.slow) >= MAX_DEFERRED:
                break
            if monotonic() - began > POLL_SECONDS:  # leave the connection to other senders
                break
            page, position = self._reader.read_page(connection, leased, position, room)
            if page is None:
                is_behind = True
                break
            missed, is_behind = missed + page.missed, page.examined > 0
            if not is_behind:
                break
            if page.matched:
                result = self._select(connection, leased, busy, free_slots)
        bodies = select_bodies(connection, result, self._select_seal)
        return SendCycle(leased, tuple((each, bodies[each.cursor]) for each in result), is_behind, missed, position)

    def _select(self, connection: Connection, leased: Subscription, busy: Sequence[int], limit: int) -> list[Due]:
        return deliveries.select_due(
            connection,
            self._id,
            busy,
            limit,
            is_ordered=leased.is_ordered,
            is_probe=leased.failures >= OPEN_AFTER_FAILURES,
        )


async def _ended(under_way: dict[asyncio.Task[Result | None], Due]) -> list[Result]:
    """Wait until deliveries finish, at most `RENEW_SECONDS`; remove them from `under_way`, return their results."""
    done, _ = await asyncio.wait(under_way, timeout=RENEW_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if done and len(done) < len(under_way):
        await asyncio.sleep(LINGER_SECONDS)
        done = {task for task in under_way if task.done()}
    for task in done:
        del under_way[task]
    results = [result for task in done if (result := task.result()) is not None]
    return sorted(results, key=lambda each: each.attempt.at + timedelta(seconds=each.attempt.seconds))


def part_of(subscription_id: int) -> str:
    """Return the name of a subscription as a part of the duty."""
    return f"subscription {subscription_id}"
