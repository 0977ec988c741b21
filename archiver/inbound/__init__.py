"""Write waiting deliveries in batches, one transaction each, and return to each caller the outcome of its delivery.

While one batch commits, the next one fills; a single event does not wait. The event loop continues to receive while a
statement waits for Postgres. A slow batch is overtaken by batches without events of its sessions. Deliveries that a
batch does not commit in time go to the spool or, without a spool, are written in successively smaller parts,
alongside the batches.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic, perf_counter

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import telemetry
from archiver.archive import DEFAULT_TIMING, Timing
from archiver.errors import ArchiverError
from archiver.events import Content, Delivery, Event
from archiver.inbound.circuit import Circuit
from archiver.inbound.fallback import SPOOL_AFTER_SECONDS, Fallback
from archiver.inbound.isolated import IsolatedWriter
from archiver.inbound.probe import Fault, database_fault
from archiver.inbound.redrive import retry_quarantined
from archiver.inbound.spool import Spool
from archiver.inbound.writing import Outcome, Result, Status, UnavailableError, write

__all__ = [
    "CONNECTIONS",
    "Fault",
    "Ingest",
    "Outcome",
    "QueueFullError",
    "Result",
    "Status",
    "UnavailableError",
    "database_fault",
    "retry_quarantined",
    "write",
]

log = structlog.get_logger(__name__)

MAX_GATHER_SECONDS = 0.01
GAUGE_EVERY = 16  # arrivals between two updates of the gauges
BATCH_MESSAGES = 10_000  # per transaction; a single event may have more
BATCH_BYTES = 16 * 1_048_576  # per transaction
LANES = 2  # concurrent batches; the second starts only if the first is slow
OVERLAP_SECONDS = 0.25  # after which other batches may overtake a batch
MAX_OVERTAKEN = 1_000  # deliveries of busy sessions that are skipped at the head of the queue
SECOND_TRY_SECONDS = 10.0  # limit of a batch that no sender waits for
PART_SECONDS, SECOND_TRY_PART_SECONDS = 1.0, 5.0  # limits of a part of a batch that timed out
CLOSING_SECONDS = 10.0  # for the parts in progress at shutdown
# Postgres connections: in addition to batches, one for parts or the spool, two for slow events, two for trials
CONNECTIONS = LANES + 5


class QueueFullError(ArchiverError):
    """Too many events are waiting for the database."""

    message = "Too many events are waiting for the database. Retry in a moment."


class _Waiting(msgspec.Struct, frozen=True):
    delivery: Delivery[Content]
    answer: asyncio.Future[Result]


def _messages(delivery: Delivery[Content]) -> int:
    chat = delivery.content.chat if isinstance(delivery.content, Event) else None
    return len(chat.input) + len(chat.output) if chat is not None else 0


class Ingest:
    """The queue and writer of the deliveries of one process; it accepts them during `running`.

    `gather_seconds`: seconds for which a batch may wait until it is full, if no sender waits for the outcome; 0: half
    the duration of the last commit, at most `MAX_GATHER_SECONDS`.
    `fallback`: stores deliveries that the database does not accept; None without a spool.
    `failed_at`: time of the last failure of the database, on `time.monotonic`'s clock; None after a success.
    """

    failed_at: float | None = None
    fallback: Fallback | None = None

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        queue_events: int,
        queue_bytes: int,
        batch_events: int,
        timing: Timing = DEFAULT_TIMING,
        gather_seconds: float = 0.0,
    ) -> None:
        self._engine = engine
        self._timing, self._gather_seconds = timing, gather_seconds
        self._circuit = Circuit(engine)
        self._isolated = IsolatedWriter(engine, timing, self._circuit)
        self._max_events, self._max_bytes, self._batch_events = queue_events, queue_bytes, batch_events
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0  # of deliveries that wait or are being written
        self._events = 0
        self._arrived = asyncio.Event()
        self._expected = 1  # number of events for which the next batch waits a moment
        self._closing = False
        self._drain: asyncio.Task[None] | None = None
        self._lanes: dict[asyncio.Task[None], set[str]] = {}  # slow batches in progress, with their subjects
        self._parts: set[asyncio.Task[None]] = set()
        self._part_gate = asyncio.Semaphore(1)

    @asynccontextmanager
    async def running(self, spool: Spool | None = None) -> AsyncIterator[None]:
        """Write batches during the block; at its end, write the waiting deliveries and accept no more."""
        if spool is not None:
            self.add_spool(spool)
        writer = asyncio.create_task(self._write_batches())
        try:
            yield
        finally:
            self._closing = True
            self._arrived.set()
            await writer
            if self._drain:
                self._drain.cancel()  # the rest stays on disk
                await asyncio.wait({self._drain})

    def add_spool(self, spool: Spool) -> None:
        """Use this spool from now on for deliveries that the database does not accept. Call within `running`."""
        self.fallback = Fallback(self._engine, spool, self._timing, self._circuit, self._isolated)
        self._drain = asyncio.create_task(self.fallback.drain())

    async def submit(self, delivery: Delivery[Content]) -> Outcome:
        """Commit one delivery, together with other waiting ones.

        Raises `QueueFullError` immediately, or `UnavailableError` if the database did not accept it. Cancelling the
        caller does not remove the delivery from its batch.
        """
        size = len(delivery.content.body)
        self.check_room(size)
        waiting = _Waiting(delivery, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._events += 1
        self._bytes += size
        if self._events % GAUGE_EVERY == 1:
            self._gauge()
        if len(self._queue) >= self._expected:
            self._arrived.set()
        result = await waiting.answer
        if isinstance(result, UnavailableError):
            raise result
        return result

    def check_room(self, size: int = 0) -> None:
        """Raise `QueueFullError` if a delivery of `size` bytes would not be accepted now."""
        full = self._events >= self._max_events or self._bytes + size > self._max_bytes
        if self._closing or (full and self._events > 0):
            raise QueueFullError

    async def _write_batches(self) -> None:
        seconds = 0.0
        while self._queue or not self._closing:
            await self._gather(seconds)
            batch = self._take()
            if batch:
                seconds = await self._begin(batch)
            elif self._queue:  # all waiting deliveries belong to sessions with a batch in progress
                await asyncio.wait(self._lanes, timeout=OVERLAP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        while self._lanes:
            await asyncio.wait(self._lanes)
        if self._parts:
            _, late = await asyncio.wait(self._parts, timeout=CLOSING_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _begin(self, batch: Sequence[_Waiting]) -> float:
        """Write a batch, and wait until the next one may begin; return the seconds waited."""
        started = perf_counter()
        task = asyncio.create_task(self._settle(batch))
        await asyncio.wait({task}, timeout=OVERLAP_SECONDS)
        if not task.done():
            self._lanes[task] = {waiting.delivery.subject for waiting in batch}
            self._expected = self._batch_events if self._gather_seconds else 1
            task.add_done_callback(lambda done: self._lanes.pop(done, None))
            while len(self._lanes) >= LANES:
                await asyncio.wait(self._lanes, return_when=asyncio.FIRST_COMPLETED)
        return perf_counter() - started

    async def _settle(self, batch: Sequence[_Waiting]) -> None:
        """Write a batch and return the outcomes to its callers, except for deliveries that are retried in parts."""
        try:
            results = await self._write([waiting.delivery for waiting in batch])
        except Exception:  # supervisor: on any error every caller gets an outcome, and the next batch starts
            log.exception("batch failed", events=len(batch))
            results = [UnavailableError()] * len(batch)
        has_failed = any(isinstance(result, UnavailableError) for result in results)
        self._note_state(has_failed=has_failed and self._circuit.is_open)
        if asyncio.current_task() not in self._lanes:  # otherwise the next batch is already being gathered
            # Senders that wait for a response before the next delivery are about to send again.
            at_once = len(batch) + len(self._queue)
            self._expected = self._batch_events if self._gather_seconds else min(at_once, self._batch_events)
        slow: list[_Waiting] = []
        for waiting, result in zip(batch, results, strict=True):
            if isinstance(result, UnavailableError) and not self._circuit.is_open:
                slow.append(waiting)
            else:
                self._answer(waiting, result)
        together = [waiting for waiting in slow if not self._isolated.knows(waiting.delivery.subject)]
        for part in (together, *([waiting] for waiting in slow if waiting not in together)):
            if part:
                self._begin_part(part)
        self._gauge()

    def _note_state(self, *, has_failed: bool) -> None:
        if self.failed_at is not None and not has_failed:
            log.info("database available again")
        self.failed_at = monotonic() if has_failed else None

    def _answer(self, waiting: _Waiting, result: Result) -> None:
        self._events -= 1
        self._bytes -= len(waiting.delivery.content.body)
        if not waiting.answer.done():
            waiting.answer.set_result(result)

    async def _write(self, deliveries: Sequence[Delivery[Content]]) -> list[Result]:
        if self.fallback:
            return await self.fallback.write(deliveries)
        quick = [place for place, each in enumerate(deliveries) if not self._isolated.knows(each.subject)]
        results: list[Result] = [UnavailableError()] * len(deliveries)
        if not quick:
            return results
        seconds = SECOND_TRY_SECONDS if self._gather_seconds else SPOOL_AFTER_SECONDS
        written = await write(self._engine, [deliveries[place] for place in quick], self._timing, seconds)
        for place, result in zip(quick, written, strict=True):
            results[place] = result
        await self._judge(written)
        return results

    async def _judge(self, results: Sequence[Result]) -> None:
        faults = [result for result in results if isinstance(result, UnavailableError)]
        if len(faults) < len(results):
            self._circuit.close()
        if faults:
            await self._circuit.judge(faults)

    def _begin_part(self, part: Sequence[_Waiting]) -> None:
        task = asyncio.create_task(self._write_part(part))
        self._parts.add(task)
        task.add_done_callback(self._parts.discard)

    async def _write_part(self, part: Sequence[_Waiting]) -> None:
        """Write deliveries that failed together while Postgres stored others: two halves, or a single one separately.

        Passes each outcome to its caller.
        """
        left = list(part)
        try:
            for half in (part[: len(part) // 2], part[len(part) // 2 :]) if len(part) > 1 else (part,):
                results = await self._write_half([waiting.delivery for waiting in half], is_alone=len(part) == 1)
                slow: list[_Waiting] = []
                for waiting, result in zip(half, results, strict=True):
                    left.remove(waiting)
                    if isinstance(result, UnavailableError) and len(part) > 1 and not self._circuit.is_open:
                        slow.append(waiting)
                    else:
                        self._answer(waiting, result)
                if slow:
                    self._begin_part(slow)
        except Exception:  # supervisor, as above
            log.exception("part of a batch failed", events=len(left))
        finally:
            for waiting in left:
                self._answer(waiting, UnavailableError())
            self._gauge()

    async def _write_half(self, deliveries: Sequence[Delivery[Content]], *, is_alone: bool) -> Sequence[Result]:
        if is_alone:
            return [await self._isolated.write(deliveries[0])]
        async with self._part_gate:
            seconds = SECOND_TRY_PART_SECONDS if self._gather_seconds else PART_SECONDS
            results = await write(self._engine, deliveries, self._timing, seconds)
            await self._judge(results)
        return results

    def _take(self) -> list[_Waiting]:
        """Remove and return the deliveries of the next transaction, within the limits of events, messages and bytes.

        Deliveries of a session with a batch in progress wait until that batch is done.
        """
        batch: list[_Waiting] = []
        passed_over: list[_Waiting] = []
        under_way: set[str] = set().union(*self._lanes.values())
        messages = size = 0
        while self._queue and len(batch) < self._batch_events and len(passed_over) < MAX_OVERTAKEN:
            delivery = self._queue[0].delivery
            if under_way and delivery.subject in under_way:
                passed_over.append(self._queue.popleft())
                continue
            messages += _messages(delivery)
            size += len(delivery.content.body)
            if batch and (messages > BATCH_MESSAGES or size > BATCH_BYTES):
                break
            batch.append(self._queue.popleft())
        self._queue.extendleft(reversed(passed_over))
        return batch

    def _gauge(self) -> None:
        telemetry.queue_events.set(self._events)
        telemetry.queue_bytes.set(self._bytes)

    async def _gather(self, last_seconds: float) -> None:
        """Wait for the first event, then for the expected number of events, at most half the time of a commit.

        Under load this fills batches and saves commits; if a commit is quick, there is little to save.
        """
        self._arrived.clear()
        if self._closing or len(self._queue) >= self._expected:
            return
        try:
            async with asyncio.timeout(self._gather_seconds or min(last_seconds / 2, MAX_GATHER_SECONDS)):
                await self._arrived.wait()
        except TimeoutError:
            if self._queue:
                return
            self._expected = 1
            await self._arrived.wait()
