"""Fetch histories: one reader per session, each response stored as a fact through the one write path.

No transaction is open during a call: lease, fetch, record, release.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Literal

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import database, ledger, telemetry
from archiver.archive import Timing
from archiver.database import run_async, run_split_async
from archiver.events import Delivery, Event, responses
from archiver.history import leases
from archiver.history.callhq import Client, Limits, UnauthorizedError
from archiver.history.fetching import NOT_FOUND, Answer, HistoryFetcher
from archiver.history.leased_sessions import LeasedSessions
from archiver.history.report import Outcome, ReconcileResult, ResultReporter
from archiver.inbound import Status

log = structlog.get_logger(__name__)

__all__ = ["Outcome", "ReconcileResult", "Reconciler", "Submit", "retry_pause"]

RECORDING = 6  # sessions in progress per allowed call, so that calls continue while responses are recorded
_NOT_COMMITTED = "The database did not store the response."
_NOT_STORED = "the response could not be stored; see `archiver quarantine list`"
_NOT_KNOWN = "This session is unknown to CallHQ (404) and to the archive, so it was not registered. Check the id."
MAX_RETRY = timedelta(hours=1)
MIN_RETRY = timedelta(seconds=30)

Submitted = Status | Literal["unavailable"]  # not committed: the database is unavailable
Submit = Callable[[Event, datetime], Awaitable[Submitted]]


class Reconciler:
    """A reader of histories with one client; `submit` stores a fact and returns after its commit."""

    def __init__(
        self,
        engine: AsyncEngine,
        client: Client,
        submit: Submit,
        *,
        timing: Timing,
        mark_unavailable: bool = True,
    ) -> None:
        self._engine, self._client, self._submit, self._timing = engine, client, submit, timing
        self._fetcher = HistoryFetcher(client)
        # whether to record that a session has no history, if there is still no response long after it expired
        self._mark_unavailable = mark_unavailable
        self._not_read = telemetry.Recurring("histories not read")

    @property
    def is_all_not_found(self) -> bool:
        """Return whether every response was 404, as with a wrong URL."""
        return self._fetcher.is_all_not_found

    async def read_all(
        self,
        session_ids: Sequence[str],
        on_result: Callable[[ReconcileResult], object] = lambda _: None,
        due_at: datetime | None = None,
        limits: Limits | None = None,
        on_defect: Callable[[Exception], object] = lambda _: None,
    ) -> Counter[Outcome]:
        """Read these sessions concurrently and report each result.

        A session leased by another reader is skipped (`busy`). With `due_at`, only sessions that still have this due
        time are read. `limits`: on each call. An unexpected error is passed to `on_defect`; its session counts as
        `failed`. Raises `UnauthorizedError` if the key is rejected for all; earlier results have been reported.
        """
        leased = LeasedSessions(self._engine, session_ids, due_at)
        report = ResultReporter(self._engine, leased, on_result)

        async def record(session_id: str, answer: Answer) -> None:
            lease = leased.lease_of(session_id)
            result = await self._isolated(
                session_id, answer, lambda each: self._record(session_id, lease, each), on_defect
            )
            await report.add(session_id, *result)

        async with leased.renewing_leases():
            try:
                await self._read_each(
                    leased.next_session, record, min(self._under_way, len(session_ids)), limits=limits
                )
            finally:
                await report.flush()
        report.report_busy()
        self._fetcher.check_key()
        return report.outcomes

    async def discover_all(
        self, session_ids: Sequence[str], on_result: Callable[[ReconcileResult], object] = lambda _: None
    ) -> Counter[Outcome]:
        """Read sessions that are unknown to the archive; each is registered with its first response."""
        report = ResultReporter(self._engine, LeasedSessions(self._engine, [], None), on_result)

        async def register(session_id: str, answer: Answer) -> None:
            result = await self._isolated(session_id, answer, lambda each: self._register(session_id, each))
            await report.add(session_id, *result)

        try:
            await self._read_list(session_ids, register, self._under_way)
        finally:
            await report.flush()
        self._fetcher.check_key()
        return report.outcomes

    async def preview_all(
        self, session_ids: Sequence[str], on_result: Callable[[ReconcileResult], object] = lambda _: None
    ) -> Counter[Outcome]:
        """Read these sessions and report what would change; the database is not modified.

        Raises `UnauthorizedError` if the key is rejected for all.
        """
        outcomes: Counter[Outcome] = Counter()

        async def preview(session_id: str, answer: Answer) -> None:
            result = await self._preview(session_id, answer)
            outcomes[result.outcome] += 1
            on_result(result)

        await self._read_list(session_ids, preview, self._client.concurrency)
        self._fetcher.check_key()
        return outcomes

    @property
    def _under_way(self) -> int:
        return self._client.concurrency * RECORDING

    async def _read_list(
        self, session_ids: Sequence[str], handle: Callable[[str, Answer], Awaitable[None]], under_way: int
    ) -> None:
        """Fetch and handle the history of each of these sessions, at most `under_way` at a time."""
        waiting = deque(session_ids)

        async def next_session() -> str | None:
            return waiting.popleft() if waiting else None

        await self._read_each(next_session, handle, min(under_way, len(session_ids)), lambda: not waiting)

    async def _read_each(
        self,
        next_session: Callable[[], Awaitable[str | None]],
        handle: Callable[[str, Answer], Awaitable[None]],
        under_way: int,
        is_exhausted: Callable[[], bool] = lambda: False,
        limits: Limits | None = None,
    ) -> None:
        """Fetch the history of each session and handle the result, with `under_way` sessions at a time.

        `is_exhausted`: whether it is known that no session is left; requesting one may wait for a pause.
        """

        is_retry = limits is not None and limits.is_retry

        async def work_loop() -> None:
            while not is_exhausted():
                # Wait before leasing: until then the session stays free for others.
                async with self._client.turn(is_retry=is_retry):
                    session_id = await next_session()
                    if session_id is None:
                        return
                    answer = await self._answer(session_id, limits)
                await _shielded(handle(session_id, answer))

        await _run_all(work_loop() for _ in range(under_way))

    async def _answer(self, session_id: str, limits: Limits | None) -> Answer:
        began = database.now()
        try:
            return await self._fetcher.answer(session_id, limits)
        except UnauthorizedError:
            raise
        except Exception as error:  # noqa: BLE001  # one session must not keep others from being read (I13)
            self._log_defect(session_id, error)
            return Answer.of_defect(began, error)

    async def _isolated(
        self,
        session_id: str,
        answer: Answer,
        store: Callable[[Answer], Awaitable[tuple[Outcome, str]]],
        on_defect: Callable[[Exception], object] = lambda _: None,
    ) -> tuple[Outcome, str]:
        """Store the answer of one session. An unexpected error counts as a failed call, so that others proceed."""
        while True:
            if answer.defect is not None:
                on_defect(answer.defect)
            try:
                return await store(answer)
            except Exception as error:  # noqa: BLE001  # as above
                self._log_defect(session_id, error)
                if answer.defect is not None:  # not even the failure could be stored; the session is due again later
                    return "failed", answer.fault
                answer = Answer.of_defect(answer.began, error)

    def _log_defect(self, session_id: str, error: Exception) -> None:
        if isinstance(error, SQLAlchemyError):
            self._not_read.warn(session_id=session_id, error=database.explain(error))
        else:
            log.exception("history not read", session_id=session_id)

    async def _preview(self, session_id: str, answer: Answer) -> ReconcileResult:
        event = answer.event
        if event is None:
            return ReconcileResult(session_id, "failed", error=answer.fault)
        delivery = Delivery(event, answer.began, None, responses.SOURCE)

        def record_and_roll_back(connection: Connection) -> None:
            before = leases.select_statuses(connection, [session_id]).get(session_id)
            if before is None and answer.status == NOT_FOUND:
                raise _PreviewRollbackError(ReconcileResult(session_id, "unknown", error=_NOT_KNOWN))
            ledger.record(connection, [delivery], self._timing)
            after = leases.select_statuses(connection, [session_id]).get(session_id)
            raise _PreviewRollbackError(ReconcileResult(session_id, _OUTCOMES[event.type], before, after))

        try:
            await run_async(self._engine, record_and_roll_back)
        except _PreviewRollbackError as undone:
            result: ReconcileResult = undone.result
        return result

    async def _record(self, session_id: str, lease: datetime, answer: Answer) -> tuple[Outcome, str]:
        """Commit the response for a leased session; return the outcome and the error, if any."""
        event = answer.event
        if event is None:
            self._not_read.warn(session_id=session_id, error=answer.fault)
            event = await self._failed(session_id, lease, answer)
            if event is None:
                return "failed", answer.fault
        status = await self._submit(event, answer.began)
        if status == "unavailable":
            await self._postpone(session_id, lease, answer.began + self._timing.quiet)
            return "failed", _NOT_COMMITTED
        if status == "quarantined":
            await self._postpone(session_id, lease, answer.began + MAX_RETRY)
            return "unreadable", _NOT_STORED
        outcome = _OUTCOMES[event.type]
        telemetry.readings.labels(outcome).inc()
        return outcome, answer.fault

    async def _register(self, session_id: str, answer: Answer) -> tuple[Outcome, str]:
        """Commit the registration of a session with its response; return the outcome and the error, if any."""
        if answer.status == NOT_FOUND:
            return "unknown", _NOT_KNOWN
        # Both facts have the same time; otherwise the registration might count as an event after the reading.
        facts = [responses.register({"id": session_id}), *([answer.event] if answer.event is not None else [])]
        became = await asyncio.gather(*(self._submit(event, answer.began) for event in facts))
        if "unavailable" in became:
            return "failed", _NOT_COMMITTED
        if answer.event is None:
            telemetry.readings.labels("failed").inc()
            return "failed", answer.fault
        if "quarantined" in became:
            return "unreadable", _NOT_STORED
        outcome = _OUTCOMES[answer.event.type]
        telemetry.readings.labels(outcome).inc()
        return outcome, answer.fault

    async def _failed(self, session_id: str, lease: datetime, answer: Answer) -> Event | None:
        """Schedule a retry with increasing pauses, and return None.

        If retries still fail long after the session expired, return the fact that its history is unavailable.
        """
        now = answer.began
        telemetry.readings.labels("failed").inc()
        schedule = await run_async(self._engine, lambda c: leases.select_schedule(c, session_id))
        if schedule is None:
            return None
        since, margin = schedule.failing_since or now, self._timing.margin
        has_expired = schedule.read_by is not None and now > schedule.read_by + 2 * margin
        if self._mark_unavailable and has_expired and now >= since + margin:
            return responses.unavailable_event(session_id)
        requested_pause = min(timedelta(seconds=answer.retry_after), MAX_RETRY)
        pause = max(retry_pause(self._timing, schedule.read_by, since, now), requested_pause)
        await self._postpone(session_id, lease, now + pause, failing_since=since)
        return None

    async def _postpone(
        self, session_id: str, lease: datetime, until: datetime, *, failing_since: datetime | None = None
    ) -> None:
        """Postpone the next reading.

        If another transaction blocks the session, its lease expires instead, and the session becomes due again.
        """

        def postpone(connection: Connection, session_ids: Sequence[str]) -> None:
            for each in session_ids:
                leases.postpone(connection, each, lease, until=until, failing_since=failing_since)

        await run_split_async(self._engine, [session_id], postpone)


def retry_pause(timing: Timing, read_by: datetime | None, since: datetime, now: datetime) -> timedelta:
    """Return the pause after a failed reading, if all readings since the time `since` have failed.

    The pauses double, but leave several attempts before the session expires at CallHQ.
    """
    pause = min(max(now - since, timing.quiet), MAX_RETRY)
    if read_by is not None and now < read_by + timing.margin:
        pause = max(min(pause, (read_by + timing.margin - now) / 4), MIN_RETRY)
    return pause


class _PreviewRollbackError(Exception):
    """The result of a preview, raised to roll back its transaction."""

    def __init__(self, result: ReconcileResult) -> None:
        super().__init__()
        self.result = result


_OUTCOMES: dict[str, Outcome] = {
    responses.READ: "read",
    responses.GONE: "gone",
    responses.UNREADABLE: "unreadable",
    responses.UNAVAILABLE: "unavailable",
}


async def _shielded(work: Awaitable[None]) -> None:
    """Complete the work even if the caller is cancelled, so that committed results are reported."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait([task])


async def _run_all(work: Iterable[Awaitable[None]]) -> None:
    """Run all work concurrently; the first error cancels the rest and is raised unchanged."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # cancel once, because a cancelled task first completes its commit
                task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
