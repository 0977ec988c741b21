"""Reading histories: each session by one reader at a time, each answer as a fact through the one write path.

No transaction is open while CallHQ is asked: lease, ask, record, and the recording gives the lease back.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from time import perf_counter
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import history, ledger, telemetry
from archiver.callhq import Client, TooLargeError, UnreachableError
from archiver.database import run_in_transaction
from archiver.events import Event
from archiver.projection import Timing, leases
from archiver.projection.leases import Standing
from archiver.reconcile.pause import SharedPause

log = structlog.get_logger(__name__)

LEASED_TOGETHER = 100
RECORDING = 6  # sessions under way for each call that may be: while some are recorded, others are asked for
LONGEST_RETRY = timedelta(hours=1)
SHORTEST_RETRY = timedelta(seconds=30)

Submit = Callable[[Event, datetime], Awaitable[str]]
Outcome = Literal["read", "gone", "unreadable", "unavailable", "failed", "busy"]


class NotRecordedError(Exception):
    """The database did not take the answer."""


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What became of one session: the outcome, where it stood before and stands now, and why a failed one failed."""

    session_id: str
    outcome: Outcome
    before: Standing | None = None
    after: Standing | None = None
    error: str = ""

    @property
    def recovered(self) -> int:
        """Messages that this reading supplied."""
        after = self.after.repaired_messages if self.after else 0
        return after - (self.before.repaired_messages if self.before else 0)


class _Answer(msgspec.Struct, frozen=True, gc=False):
    """What a call came to: the fact, or why there is none.

    `began`: when the call did; what is told from then on may be missing in its answer.
    """

    began: datetime
    event: Event | None
    fault: str = ""


class Reconciler:
    """Reads sessions with one client; `submit` takes a fact and when its reading began, and answers once it is
    committed: `quarantined` if it could not be stored.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        client: Client,
        submit: Submit,
        *,
        pause: SharedPause,
        timing: Timing,
        concurrency: int,
        gives_up: bool = True,
    ) -> None:
        self._engine, self._client, self._submit, self._timing = engine, client, submit, timing
        self._gives_up = gives_up  # where there is no answer long after a session expired
        self._pause = pause
        self._concurrency = concurrency
        self._turns = asyncio.Semaphore(concurrency)

    async def read_all(
        self, session_ids: Sequence[str], told: Callable[[Reading], object] = lambda _: None
    ) -> Counter[Outcome]:
        """Read these sessions, some at a time, and tell of each what became of it.

        A session that somebody else reads at present is left to them (`busy`). Raises `UnauthorizedError`; the
        leases of sessions not read by then are given back.
        """
        leased = _Leased(self._engine, session_ids)
        outcomes: Counter[Outcome] = Counter()

        async def one_after_another() -> None:
            while True:
                # Waiting for its turn and for CallHQ's pause comes first: the lease and the clock run after that.
                async with self._turns:
                    await self._pause.wait()
                    session = await leased.next_session()
                    if session is None:
                        return
                    part, session_id = session
                    answer = await self._ask_in_time(session_id)
                part.read[session_id] = await self._record(session_id, part.lease, answer)
                leased.held.pop(session_id, None)
                if part.is_read():
                    await report(part)

        async def report(part: _Part) -> None:
            leased.parts.remove(part)
            ids = list(part.before)
            after = await run_in_transaction(self._engine, lambda c: leases.select_standings(c, ids))
            for session_id, (outcome, error) in part.read.items():
                outcomes[outcome] += 1
                told(Reading(session_id, outcome, part.before.get(session_id), after.get(session_id), error))

        try:
            await _together(one_after_another() for _ in range(min(self._concurrency * RECORDING, len(session_ids))))
        finally:
            await run_in_transaction(self._engine, lambda c: leases.release(c, leased.held))
        for part in list(leased.parts):
            await report(part)
        for session_id in leased.busy:
            outcomes["busy"] += 1
            told(Reading(session_id, "busy"))
        return outcomes

    async def preview_all(
        self, session_ids: Sequence[str], told: Callable[[Reading], object] = lambda _: None
    ) -> Counter[Outcome]:
        """Read these sessions and tell what would become of each, without a trace in the database."""
        outcomes: Counter[Outcome] = Counter()
        waiting = iter(session_ids)

        async def one_after_another() -> None:
            for session_id in waiting:
                async with self._turns:
                    await self._pause.wait()
                    reading = await self._preview(session_id)
                outcomes[reading.outcome] += 1
                told(reading)

        await _together(one_after_another() for _ in range(min(self._concurrency, len(session_ids))))
        return outcomes

    async def _preview(self, session_id: str) -> Reading:
        answer = await self._ask_in_time(session_id)
        event = answer.event
        if event is None:
            return Reading(session_id, "failed", error=answer.fault)
        observation = ledger.Observation(event, answer.began, history.SOURCE, None)

        def record_and_undo(connection: Connection) -> None:
            before = leases.select_standings(connection, [session_id]).get(session_id)
            ledger.record(connection, [observation], self._timing)
            after = leases.select_standings(connection, [session_id]).get(session_id)
            raise _UndoneError(Reading(session_id, _OUTCOMES[event.type], before, after))

        try:
            await run_in_transaction(self._engine, record_and_undo)
        except _UndoneError as undone:
            reading: Reading = undone.reading
        return reading

    async def _record(self, session_id: str, lease: datetime, answer: _Answer) -> tuple[Outcome, str]:
        """Commit what a session leased by us was answered: its outcome, and what went wrong if something did."""
        event = answer.event
        if event is None:
            log.warning("history not read", session_id=session_id, error=answer.fault)
            event = await self._failed(session_id, lease, answer.began)
            if event is None:
                return "failed", answer.fault
        try:
            status = await self._submit(event, answer.began)
        except NotRecordedError as error:
            await self._postpone(session_id, lease, answer.began + self._timing.quiet)
            return "failed", str(error.__doc__)
        if status == "quarantined":
            await self._postpone(session_id, lease, answer.began + LONGEST_RETRY)
            return "unreadable", "its answer could not be stored: see archiver quarantine list"
        outcome = _OUTCOMES[event.type]
        telemetry.readings.labels(outcome).inc()
        return outcome, answer.fault

    async def _ask_in_time(self, session_id: str) -> _Answer:
        began, started = datetime.now(UTC), perf_counter()
        try:
            async with asyncio.timeout(leases.READ.total_seconds()):
                event = await self._ask(session_id)
        except (UnreachableError, TimeoutError) as error:
            return _Answer(began, None, str(error) or f"no answer in {leases.READ.seconds} s")
        telemetry.reading_seconds.observe(perf_counter() - started)
        return _Answer(began, event)

    async def _ask(self, session_id: str) -> Event:
        try:
            answer = await self._client.history(session_id)
        except TooLargeError as error:
            log.warning("history too large", session_id=session_id, error=str(error))
            return history.observe(session_id, 413, b"")
        return history.observe(session_id, answer.status, answer.body)

    async def _failed(self, session_id: str, lease: datetime, now: datetime) -> Event | None:
        """Try again later, ever later; where that goes on after upstream forgot the session, it is a fact itself."""
        telemetry.readings.labels("failed").inc()
        schedule = await run_in_transaction(self._engine, lambda c: leases.select_schedule(c, session_id))
        if schedule is None:
            return None
        since, margin = schedule.failing_since or now, self._timing.margin
        has_expired = schedule.read_by is not None and now > schedule.read_by + 2 * margin
        if self._gives_up and has_expired and now >= since + margin:
            return history.give_up(session_id)
        # As long again as it has been failing: the pauses double. But several times before upstream forgets it.
        pause = min(max(now - since, self._timing.quiet), LONGEST_RETRY)
        if schedule.read_by is not None and now < schedule.read_by + self._timing.margin:
            left = schedule.read_by + self._timing.margin - now
            pause = max(min(pause, left / 4), SHORTEST_RETRY)
        await self._postpone(session_id, lease, now + pause, failing_since=since)
        return None

    async def _postpone(
        self, session_id: str, lease: datetime, until: datetime, *, failing_since: datetime | None = None
    ) -> None:
        postpone = partial(leases.postpone, session_id=session_id, lease=lease, until=until)
        await run_in_transaction(self._engine, partial(postpone, failing_since=failing_since))


class _Part:
    """Sessions leased together until `lease`: where they stood, and what became of those read."""

    def __init__(self, before: dict[str, Standing], lease: datetime) -> None:
        self.before = before
        self.lease = lease
        self.waiting = deque(before)
        self.read: dict[str, tuple[Outcome, str]] = {}

    def is_read(self) -> bool:
        return len(self.read) == len(self.before)


class _Leased:
    """Hands out sessions to read, leasing the next ones when those at hand are used up.

    `held` are those whose leases are to be given back in the end, `busy` those that somebody else reads, `parts`
    those of which nothing has been told yet.
    """

    def __init__(self, engine: AsyncEngine, session_ids: Sequence[str]) -> None:
        self._engine = engine
        self._left = deque(dict.fromkeys(session_ids))
        self._part = _Part({}, datetime.now(UTC))
        self._leasing = asyncio.Lock()
        self.held: dict[str, datetime] = {}
        self.busy: list[str] = []
        self.parts: list[_Part] = []

    async def next_session(self) -> tuple[_Part, str] | None:
        """The next one, and the part that it belongs to; None: there is no more."""
        async with self._leasing:
            while True:
                if self._part.waiting and datetime.now(UTC) + leases.READ + leases.RECORD > self._part.lease:
                    await self._give_back()
                if self._part.waiting:
                    return self._part, self._part.waiting.popleft()
                if not self._left:
                    return None
                await self._lease([self._left.popleft() for _ in range(min(LEASED_TOGETHER, len(self._left)))])

    async def _give_back(self) -> None:
        """It is too late to be done before the lease ends: what is left of the part is leased anew."""
        late = dict.fromkeys(self._part.waiting, self._part.lease)
        self._part.waiting.clear()
        for session_id in late:
            del self._part.before[session_id], self.held[session_id]
        self._left.extendleft(reversed(late))
        await run_in_transaction(self._engine, lambda c: leases.release(c, late))

    async def _lease(self, session_ids: Sequence[str]) -> None:
        now = datetime.now(UTC)
        lease = now + leases.LEASE
        mine = await run_in_transaction(self._engine, lambda c: leases.claim(c, session_ids, now, lease))
        self.busy += [session_id for session_id in session_ids if session_id not in mine]
        self.held |= dict.fromkeys(mine, lease)
        self._part = _Part(mine, lease)
        self.parts.append(self._part)


class _UndoneError(Exception):
    """Takes what would be out of a transaction that is rolled back by it."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading


_OUTCOMES: dict[str, Outcome] = {
    history.READ: "read",
    history.GONE: "gone",
    history.UNREADABLE: "unreadable",
    history.UNAVAILABLE: "unavailable",
}


async def _together(work: Iterable[Awaitable[None]]) -> None:
    """All of them; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
