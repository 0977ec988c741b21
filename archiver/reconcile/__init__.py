"""Reading histories: each session by one reader at a time, each answer as a fact through the one write path.

No transaction is open while CallHQ is asked: lease, ask, record, give back.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import history, ledger, telemetry
from archiver.callhq import Client
from archiver.database import run_apart, run_in_transaction
from archiver.events import Event
from archiver.projection import Timing, leases
from archiver.reconcile.asking import NOT_FOUND, Answer, Asking
from archiver.reconcile.leased import Leased
from archiver.reconcile.pause import SharedPause
from archiver.reconcile.report import Outcome, Reading, Report

__all__ = ["NotRecordedError", "Outcome", "Reading", "Reconciler", "Submit", "retry_pause"]

RECORDING = 6  # sessions under way for each call that may be: while some are recorded, others are asked for
_NOT_STORED = "its answer could not be stored: see archiver quarantine list"
_NOT_KNOWN = "CallHQ does not know this session (404), nor does the archive: is the id right? It was not registered."
LONGEST_RETRY = timedelta(hours=1)
SHORTEST_RETRY = timedelta(seconds=30)

Submit = Callable[[Event, datetime], Awaitable[str]]


class NotRecordedError(Exception):
    """The database did not take the answer."""


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
        self._engine, self._submit, self._timing = engine, submit, timing
        self._asking = Asking(client)
        self._gives_up = gives_up  # where there is no answer long after a session expired
        self._pause = pause
        self._concurrency = concurrency
        self._turns = asyncio.Semaphore(concurrency)
        self._not_read = telemetry.Recurring("histories not read")

    @property
    def finds_nothing(self) -> bool:
        """Whether every answer was 404, as it is where the URL is not the API's."""
        return self._asking.finds_nothing

    async def read_all(
        self,
        session_ids: Sequence[str],
        told: Callable[[Reading], object] = lambda _: None,
        due_at: datetime | None = None,
    ) -> Counter[Outcome]:
        """Read these sessions, some at a time, and tell of each what became of it.

        A session that somebody else reads at present is left to them (`busy`). With `due_at` only those are read
        whose reading is due as of then. Raises `UnauthorizedError` if the key is refused for all; what was read by
        then has been told.
        """
        leased = Leased(self._engine, session_ids, due_at)
        report = Report(self._engine, leased, told)

        async def record(session_id: str, answer: Answer) -> None:
            await report.add(session_id, *await self._record(session_id, leased.lease_of(session_id), answer))

        async def one_after_another() -> None:
            while True:
                # CallHQ's pause comes first: what is not leased meanwhile is free for others.
                async with self._turns:
                    await self._pause.wait()
                    session_id = await leased.next_session()
                    if session_id is None:
                        return
                    answer = await self._asking.answer(session_id)
                await _to_the_end(record(session_id, answer))

        async with leased.kept():
            try:
                await _together(
                    one_after_another() for _ in range(min(self._concurrency * RECORDING, len(session_ids)))
                )
            finally:
                await report.tell()
        report.tell_busy()
        self._asking.check_key()
        return report.outcomes

    async def meet_all(
        self, session_ids: Sequence[str], told: Callable[[Reading], object] = lambda _: None
    ) -> Counter[Outcome]:
        """The same for sessions that the archive has never heard of. Each is registered with its first answer; one
        that CallHQ does not know either is not (`unknown`).
        """
        report = Report(self._engine, Leased(self._engine, [], None), told)
        waiting = iter(session_ids)

        async def register(session_id: str, answer: Answer) -> None:
            await report.add(session_id, *await self._register(session_id, answer))

        async def one_after_another() -> None:
            for session_id in waiting:
                async with self._turns:
                    await self._pause.wait()
                    answer = await self._asking.answer(session_id)
                await _to_the_end(register(session_id, answer))

        try:
            await _together(one_after_another() for _ in range(min(self._concurrency * RECORDING, len(session_ids))))
        finally:
            await report.tell()
        self._asking.check_key()
        return report.outcomes

    async def preview_all(
        self, session_ids: Sequence[str], told: Callable[[Reading], object] = lambda _: None
    ) -> Counter[Outcome]:
        """Read these sessions and tell what would become of each, without a trace in the database.

        Raises `UnauthorizedError` if the key is refused for all.
        """
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
        self._asking.check_key()
        return outcomes

    async def _preview(self, session_id: str) -> Reading:
        answer = await self._asking.answer(session_id)
        event = answer.event
        if event is None:
            return Reading(session_id, "failed", error=answer.fault)
        observation = ledger.Observation(event, answer.began, history.SOURCE, None)

        def record_and_undo(connection: Connection) -> None:
            before = leases.select_standings(connection, [session_id]).get(session_id)
            if before is None and answer.status == NOT_FOUND:
                raise _UndoneError(Reading(session_id, "unknown", error=_NOT_KNOWN))
            ledger.record(connection, [observation], self._timing)
            after = leases.select_standings(connection, [session_id]).get(session_id)
            raise _UndoneError(Reading(session_id, _OUTCOMES[event.type], before, after))

        try:
            await run_in_transaction(self._engine, record_and_undo)
        except _UndoneError as undone:
            reading: Reading = undone.reading
        return reading

    async def _record(self, session_id: str, lease: datetime, answer: Answer) -> tuple[Outcome, str]:
        """Commit what a session leased by us was answered: its outcome, and what went wrong if something did."""
        event = answer.event
        if event is None:
            self._not_read.warn(session_id=session_id, error=answer.fault)
            event = await self._failed(session_id, lease, answer)
            if event is None:
                return "failed", answer.fault
        try:
            status = await self._submit(event, answer.began)
        except NotRecordedError as error:
            await self._postpone(session_id, lease, answer.began + self._timing.quiet)
            return "failed", str(error.__doc__)
        if status == "quarantined":
            await self._postpone(session_id, lease, answer.began + LONGEST_RETRY)
            return "unreadable", _NOT_STORED
        outcome = _OUTCOMES[event.type]
        telemetry.readings.labels(outcome).inc()
        return outcome, answer.fault

    async def _register(self, session_id: str, answer: Answer) -> tuple[Outcome, str]:
        """Commit that there is such a session, and what was answered of it: the outcome, and what went wrong."""
        if answer.status == NOT_FOUND:
            return "unknown", _NOT_KNOWN
        # Both at one time: by another clock the session might have been heard of after its reading, as if by news.
        facts = [history.register({"id": session_id}), *([answer.event] if answer.event is not None else [])]
        try:
            became = await asyncio.gather(*(self._submit(event, answer.began) for event in facts))
        except NotRecordedError as error:
            return "failed", str(error.__doc__)
        if answer.event is None:
            telemetry.readings.labels("failed").inc()
            return "failed", answer.fault
        if "quarantined" in became:
            return "unreadable", _NOT_STORED
        outcome = _OUTCOMES[answer.event.type]
        telemetry.readings.labels(outcome).inc()
        return outcome, answer.fault

    async def _failed(self, session_id: str, lease: datetime, answer: Answer) -> Event | None:
        """Try again later, ever later; where that goes on after upstream forgot the session, it is a fact itself."""
        now = answer.began
        telemetry.readings.labels("failed").inc()
        schedule = await run_in_transaction(self._engine, lambda c: leases.select_schedule(c, session_id))
        if schedule is None:
            return None
        since, margin = schedule.failing_since or now, self._timing.margin
        has_expired = schedule.read_by is not None and now > schedule.read_by + 2 * margin
        if self._gives_up and has_expired and now >= since + margin:
            return history.give_up(session_id)
        wanted = min(timedelta(seconds=answer.retry_after), LONGEST_RETRY)
        pause = max(retry_pause(self._timing, schedule.read_by, since, now), wanted)
        await self._postpone(session_id, lease, now + pause, failing_since=since)
        return None

    async def _postpone(
        self, session_id: str, lease: datetime, until: datetime, *, failing_since: datetime | None = None
    ) -> None:
        """Where another transaction holds the session its lease ends by itself, and it is handed out again later."""

        def postpone(connection: Connection, session_ids: Sequence[str]) -> None:
            for each in session_ids:
                leases.postpone(connection, each, lease, until=until, failing_since=failing_since)

        await run_apart(self._engine, [session_id], postpone)


def retry_pause(timing: Timing, read_by: datetime | None, since: datetime, now: datetime) -> timedelta:
    """How long to wait after a reading that failed, as all have `since` then.

    As long again as it has been failing: the pauses double. But several times before upstream forgets the session.
    """
    pause = min(max(now - since, timing.quiet), LONGEST_RETRY)
    if read_by is not None and now < read_by + timing.margin:
        pause = max(min(pause, (read_by + timing.margin - now) / 4), SHORTEST_RETRY)
    return pause


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


async def _to_the_end(work: Awaitable[None]) -> None:
    """Even where whoever waits for it is cancelled: what is being committed is told, too."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait([task])


async def _together(work: Iterable[Awaitable[None]]) -> None:
    """All of them; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # told once they end what they are committing
                task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
