"""The sender of one subscription: claim, commit, send, settle. Each has connections of its own, so that a receiver
that hangs or fails delays no other.

A turn is one short transaction: what came of the last deliveries is recorded, the lease renewed, the next ones read,
with what the archive holds of them; where few are left, the feed is looked at further. Sending happens between turns.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, ledger, telemetry
from archiver.database import run_in_transaction
from archiver.followups import deliveries, subscriptions
from archiver.followups.contents import select_bodies
from archiver.followups.deliveries import Due, Result
from archiver.followups.fanout import MOST_PENDING, PAGE, Page, fan_out, search
from archiver.followups.guard import RefusedError, endpoint
from archiver.followups.pace import Pace
from archiver.followups.schedule import FAILURES, GIVE_UP_AFTER, probe_after
from archiver.followups.sending import GONE, Attempt, Transport
from archiver.followups.subscriptions import Subscription
from archiver.identity import Guard

log = structlog.get_logger(__name__)

FRESH_SECONDS = 2.0  # for which content that was read may be sent; then it is read again, for it may have been erased
AHEAD = 4  # times its concurrency: what is read before it can be sent
RENEW_SECONDS = 5.0  # of a lease that lasts longer
LINGER_SECONDS = 0.02  # in which results gather for one transaction
PAGES = 5  # of the feed in one transaction
LOOK_SECONDS = 0.5  # at the feed in one transaction, about
DATABASE_SECONDS = 20.0
RETRY_SECONDS = 1.0  # while the database is away
_OVERLOADED = frozenset({429, 503})


class Ready(msgspec.Struct, frozen=True):
    """A delivery with its body, as the archive was at that time of our clock."""

    due: Due
    body: bytes
    read_at: float


class Turn(msgspec.Struct, frozen=True):
    """What a turn found: None where the subscription is not ours. `is_behind`: the feed may hold more for it."""

    subscription: Subscription | None
    found: tuple[tuple[Due, bytes], ...] = ()
    is_behind: bool = False
    missed: int = 0


class Sender:
    """Sends for one subscription while there is something to send. `owner` names whoever leases."""

    def __init__(
        self,
        subscription_id: int,
        engine: AsyncEngine,
        pace: Pace,
        owner: str,
        *,
        allow_private: bool,
        guard: Guard | None = None,
    ) -> None:
        self._guard = guard
        self._id, self._engine, self._pace, self._owner = subscription_id, engine, pace, owner
        self._allow_private = allow_private
        self._transport: Transport | None = None
        self._slots = asyncio.Semaphore(1)
        self._page = PAGE
        self._is_told_to_wait = False  # by its receiver, or because the subscription is not ours any more

    async def aclose(self) -> None:
        """End its connections."""
        if self._transport is not None:
            await self._transport.aclose()

    async def drain(self, ending: asyncio.Event) -> None:
        """Send what is due, until nothing is, or it is told to end; then what is under way is still recorded."""
        under_way: dict[asyncio.Task[Result | None], Due] = {}
        results: list[Result] = []
        try:
            while True:
                turn = await self._turn(results, list(under_way.values()), is_ending=ending.is_set())
                results = []
                leased = turn.subscription
                self._is_told_to_wait = leased is None or leased.closed_seconds > 0
                self._begin(turn, under_way)
                if not under_way:
                    if turn.subscription is None or ending.is_set() or not turn.is_behind:
                        return
                    continue
                results = await _ended(under_way)
        finally:
            for task in under_way:
                task.cancel()

    def _begin(self, turn: Turn, under_way: dict[asyncio.Task[Result | None], Due]) -> None:
        if turn.subscription is None:
            return
        if turn.missed:
            log.error(
                "the feed does not hold changes any more that were not told",
                subscription=self._id,
                changes=turn.missed,
            )
        now = monotonic()
        for due, body in turn.found:
            sending = self._send(self._connect(turn.subscription), turn.subscription, Ready(due, body, now))
            under_way[asyncio.create_task(sending)] = due

    def _connect(self, subscription: Subscription) -> Transport | None:
        """None where the URL is none that would be accepted."""
        if self._transport is None:
            try:
                where = endpoint(subscription.url)
            except RefusedError:
                return None
            most = subscription.concurrency
            self._transport = Transport(where, concurrency=most, allow_private=self._allow_private)
            self._slots = asyncio.Semaphore(most)
        return self._transport

    async def _send(self, transport: Transport | None, subscription: Subscription, ready: Ready) -> Result | None:
        """None where its content would be too old by now, or the receiver asked for a pause: it is read again."""
        async with self._slots:
            is_old = monotonic() - ready.read_at > FRESH_SECONDS
            if is_old or not await self._pace.turn() or self._is_told_to_wait:
                return None
            if transport is None:
                return Result(ready.due, Attempt.refused())
            attempt = await transport.send(subscription, ready.due.message_id, ready.body)
            if attempt.status == GONE or (attempt.status in _OVERLOADED and attempt.retry_after):
                self._is_told_to_wait = True
        result = Result(ready.due, attempt)
        telemetry.followup_seconds.observe(attempt.seconds)
        telemetry.followup_attempts.labels("failed" if result.state == "pending" else result.state).inc()
        return result

    async def _turn(self, results: Sequence[Result], under_way: Sequence[Due], *, is_ending: bool) -> Turn:
        """What came of deliveries is known here alone: it is tried until it is recorded."""
        is_told = False
        while True:
            try:
                return await run_in_transaction(
                    self._engine,
                    lambda connection: self._settle(connection, results, under_way, is_ending=is_ending),
                    DATABASE_SECONDS,
                )
            except (DBAPIError, PoolTimeoutError, TimeoutError) as error:
                if is_ending:
                    raise
                telemetry.followup_waits.inc()
                if not is_told:
                    reason = database.explain(error)
                    log.error("follow-ups wait for the database", subscription=self._id, reason=reason)  # noqa: TRY400
                is_told = True
            await asyncio.sleep(RETRY_SECONDS)

    def _settle(
        self, connection: Connection, results: Sequence[Result], under_way: Sequence[Due], *, is_ending: bool
    ) -> Turn:
        if self._guard is not None and self._guard.reason(connection):
            return Turn(None)
        if results:
            ledger.lock_placement(connection, exclusive=False)  # beside no erasure: it or we see the other
            deliveries.record(connection, self._id, results)
        leased = subscriptions.lease(connection, self._id, self._owner)
        if leased is None:
            return Turn(None)
        judged = self._judge(connection, leased, results)
        if judged is None:
            return Turn(None)
        turn = Turn(judged) if is_ending else self._next(connection, judged, under_way)
        if not turn.found and not under_way and not turn.is_behind:
            subscriptions.release(connection, self._id, self._owner)
        return turn

    def _judge(self, connection: Connection, leased: Subscription, results: Sequence[Result]) -> Subscription | None:
        """Keep count of failures in a row; None where the subscription is at its end for now."""
        if not results:
            return leased
        failures, wait = leased.failures, 0.0
        for each in results:
            failures = 0 if each.attempt.fault is None else failures + 1
            if each.attempt.status in _OVERLOADED:
                wait = max(wait, each.attempt.retry_after or 0.0)
        # What was under way when it was cut off says nothing new: from there on a probe counts, one at a time.
        probes = 0 if leased.closed_seconds > 0 else 1
        failures = min(failures, max(leased.failures + probes, FAILURES))
        is_gone = any(each.attempt.status == GONE for each in results)
        if failures == leased.failures == 0 and not wait and not is_gone:
            return leased
        subscriptions.set_circuit(connection, self._id, failures, max(wait, probe_after(failures)))
        judged = subscriptions.lease(connection, self._id, self._owner)  # as it is now
        is_lost = judged is not None and judged.failing_seconds > GIVE_UP_AFTER.total_seconds()
        if not is_gone and not is_lost:
            return judged
        reason = subscriptions.GONE if is_gone else subscriptions.FAILING
        subscriptions.release(connection, self._id, self._owner)
        subscriptions.pause(connection, self._id, reason)
        log.error("a subscription is paused", subscription=self._id, reason=reason)
        return None

    def _next(self, connection: Connection, leased: Subscription, under_way: Sequence[Due]) -> Turn:
        if leased.closed_seconds > 0:
            return Turn(leased)
        is_probe = leased.failures >= FAILURES
        wanted = (1 if is_probe else leased.concurrency * AHEAD) - len(under_way)
        if wanted <= 0:
            return Turn(leased)
        busy = [each.cursor for each in under_way]
        found = self._select(connection, leased, busy, wanted)
        after, missed, is_behind = leased.cursor, 0, False
        began = monotonic()
        for _ in range(PAGES):
            room = MOST_PENDING - deliveries.count_pending(connection, self._id, MOST_PENDING)
            if len(found) >= wanted or room == 0:
                break
            if monotonic() - began > LOOK_SECONDS:  # and the others may have the connection
                break
            page = self._look(connection, leased, after, room)
            if page is None:
                is_behind = True
                break
            after, missed, is_behind = page.through, missed + page.missed, page.looked_at > 0
            if not is_behind:
                break
            if page.told:
                found = self._select(connection, leased, busy, wanted)
        bodies = select_bodies(connection, found)
        return Turn(leased, tuple((each, bodies[each.cursor]) for each in found), is_behind, missed)

    def _look(self, connection: Connection, leased: Subscription, after: int, room: int) -> Page | None:
        """At the next page of the feed, which is as large as can be searched soon; None if this one was not."""
        if leased.filter.contains is None:
            return fan_out(connection, leased, after, room)
        began = monotonic()
        page = search(connection, leased, after, min(self._page, room))
        if page is None:
            held = subscriptions.select_newest_cursor(connection) - after  # the feed has no gaps
            self._page = max(1, min(self._page, held, room) // 2)
        elif monotonic() - began > LOOK_SECONDS:
            self._page = max(1, self._page // 2)
        elif monotonic() - began < LOOK_SECONDS / 4:
            self._page = min(PAGE, self._page * 2)
        return page

    def _select(self, connection: Connection, leased: Subscription, busy: Sequence[int], most: int) -> list[Due]:
        return deliveries.select_due(
            connection,
            self._id,
            busy,
            most,
            is_ordered=leased.is_ordered,
            is_probe=leased.failures >= FAILURES,
        )


async def _ended(under_way: dict[asyncio.Task[Result | None], Due]) -> list[Result]:
    """The results of those that ended, which are taken out: of several that end soon after each other together."""
    done, _ = await asyncio.wait(under_way, timeout=RENEW_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if done and len(done) < len(under_way):
        await asyncio.sleep(LINGER_SECONDS)
        done = {task for task in under_way if task.done()}
    for task in done:
        del under_way[task]
    results = [result for task in done if (result := task.result()) is not None]
    return sorted(results, key=lambda each: each.attempt.at + timedelta(seconds=each.attempt.seconds))
