"""Group commit: what waits is written in one transaction, and each waiting request learns its own outcome.

While one batch commits, the next fills; a lone event waits for nobody. The event loop keeps receiving wherever a
statement waits for Postgres.
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
from archiver.events import Event
from archiver.ingest.fallback import Fallback
from archiver.ingest.probe import Fault, database_fault
from archiver.ingest.redrive import retry_quarantined
from archiver.ingest.writing import Delivery, Outcome, Result, UnavailableError, write
from archiver.projection import DEFAULT_TIMING, Timing
from archiver.spool import Spool

__all__ = [
    "Delivery",
    "Fault",
    "Ingest",
    "Outcome",
    "QueueFullError",
    "Result",
    "UnavailableError",
    "database_fault",
    "retry_quarantined",
    "write",
]

log = structlog.get_logger(__name__)

LONGEST_GATHERING_SECONDS = 0.01
GAUGED = 16  # of so many arrivals one brings the gauges up to date: enough to see a queue grow
BATCH_MESSAGES = 10_000  # in the events of one transaction; one event may hold as many as it may
BATCH_BYTES = 16 * 1_048_576  # likewise


class QueueFullError(Exception):
    """Too many events wait for the database; send this one again in a moment."""


class _Waiting(msgspec.Struct, frozen=True):
    delivery: Delivery
    answer: asyncio.Future[Result]


def _messages(delivery: Delivery) -> int:
    chat = delivery.content.chat if isinstance(delivery.content, Event) else None
    return len(chat.input) + len(chat.output) if chat is not None else 0


class Ingest:
    """The queue of one process; takes deliveries while `running`.

    `patience`: seconds for which a batch may wait until it is full, where nobody waits for the answer; 0: a batch
    waits for no longer than what it may save.
    `fallback`: takes what the database does not; None without a spool.
    `failed_at`: when a batch last failed for the database's sake, on `time.monotonic`'s clock; None after a success.
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
        patience: float = 0.0,
    ) -> None:
        self._engine = engine
        self._timing, self._patience = timing, patience
        self._max_events, self._max_bytes, self._batch_events = queue_events, queue_bytes, batch_events
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0  # of what waits and of what is being written
        self._events = 0
        self._arrived = asyncio.Event()
        self._expected = 1  # events for which the next batch waits a moment
        self._closing = False
        self._drain: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self, spool: Spool | None = None) -> AsyncIterator[None]:
        """Write batches meanwhile; at the end write what still waits, and take nothing more."""
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
        """From now on what the database does not take goes there. Within `running`."""
        self.fallback = Fallback(self._engine, spool, self._timing)
        self._drain = asyncio.create_task(self.fallback.drain())

    async def submit(self, delivery: Delivery) -> Outcome:
        """Commit one delivery, together with whatever else waits.

        Raises `QueueFullError` at once, or `UnavailableError` when the database did not take it. Cancelling the
        caller does not take the delivery out of its batch.
        """
        size = len(delivery.content.body)
        self.check_room(size)
        waiting = _Waiting(delivery, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._events += 1
        self._bytes += size
        if self._events % GAUGED == 1:
            self._gauge()
        if len(self._queue) >= self._expected:
            self._arrived.set()
        result = await waiting.answer
        if isinstance(result, UnavailableError):
            raise result
        return result

    def check_room(self, size: int = 0) -> None:
        """Raises `QueueFullError` where a delivery of so many bytes would not be taken now."""
        full = self._events >= self._max_events or self._bytes + size > self._max_bytes
        if self._closing or (full and self._events > 0):
            raise QueueFullError

    async def _write_batches(self) -> None:
        seconds = 0.0
        while self._queue or not self._closing:
            await self._gather(seconds)
            batch = self._take()
            if not batch:
                continue
            started = perf_counter()
            deliveries = [waiting.delivery for waiting in batch]
            try:
                results = await self._write(deliveries)
            except Exception:  # the supervisor: whatever happens, everyone is answered and the next batch comes
                log.exception("batch failed", events=len(batch))
                results = [UnavailableError()] * len(batch)
            seconds = perf_counter() - started
            has_failed = isinstance(results[0], UnavailableError)
            if self.failed_at is not None and not has_failed:
                log.info("database available again")
            self.failed_at = monotonic() if has_failed else None
            # Senders that wait for an answer before they send again are about to: so many may come at once.
            at_once = len(batch) + len(self._queue)
            self._expected = self._batch_events if self._patience else min(at_once, self._batch_events)
            for waiting, result in zip(batch, results, strict=True):
                self._events -= 1
                self._bytes -= len(waiting.delivery.content.body)
                if not waiting.answer.done():
                    waiting.answer.set_result(result)
            self._gauge()

    async def _write(self, deliveries: Sequence[Delivery]) -> list[Result]:
        if self.fallback:
            return await self.fallback.write(deliveries)
        return await write(self._engine, deliveries, self._timing)

    def _take(self) -> list[_Waiting]:
        """What fits into one transaction of bounded length: so many events, messages and bytes."""
        batch: list[_Waiting] = []
        messages = size = 0
        while self._queue and len(batch) < self._batch_events:
            delivery = self._queue[0].delivery
            messages += _messages(delivery)
            size += len(delivery.content.body)
            if batch and (messages > BATCH_MESSAGES or size > BATCH_BYTES):
                break
            batch.append(self._queue.popleft())
        return batch

    def _gauge(self) -> None:
        telemetry.queue_events.set(self._events)
        telemetry.queue_bytes.set(self._bytes)

    async def _gather(self, last_seconds: float) -> None:
        """Wait for the first event, or for as many as are expected, but for those no longer than half a commit.

        Under load this fills batches, and so saves commits; when a commit is quick there is little to save.
        """
        self._arrived.clear()
        if self._closing or len(self._queue) >= self._expected:
            return
        try:
            async with asyncio.timeout(self._patience or min(last_seconds / 2, LONGEST_GATHERING_SECONDS)):
                await self._arrived.wait()
        except TimeoutError:
            if self._queue:
                return
            self._expected = 1
            await self._arrived.wait()
