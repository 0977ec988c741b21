"""Group commit: what waits is written in one transaction, and each waiting request learns its own outcome.

While one batch commits, the next fills; a lone event waits for nobody. The event loop keeps receiving wherever a
statement waits for Postgres.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import monotonic, perf_counter
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Connection, Engine, RowMapping
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import events, ledger, quarantine, telemetry
from archiver.database import explain, is_data_error, run_in_transaction, sqlstate, transaction
from archiver.events import Event, Malformed
from archiver.projection import Timing
from archiver.quarantine import Reject

log = structlog.get_logger(__name__)

_TIMING = Timing()

Status = Literal["stored", "duplicate", "ignored", "quarantined"]

LONGEST_GATHERING_SECONDS = 0.01
GAUGED = 16  # of so many arrivals one brings the gauges up to date: enough to see a queue grow
BATCH_MESSAGES = 10_000  # in the events of one transaction; one event may hold as many as it may
BATCH_BYTES = 16 * 1_048_576  # likewise
BATCH_SECONDS = 60  # after which a database that says nothing at all counts as gone


class QueueFullError(Exception):
    """Too many events wait for the database; send this one again in a moment."""


class UnavailableError(Exception):
    """The database did not take the event; send it again."""


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """An authenticated delivery, read or not: when it came, which secret proved it, and how often it has come."""

    content: Event | Malformed
    received_at: datetime
    key_id: str | None
    source: str = events.WEBHOOK
    count: int = 1


class Outcome(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What became of a delivery. `id` is its row in the ledger, or in the quarantine with a `reason`.

    As JSON it is the answer to the sender.
    """

    status: Status
    id: int
    reason: str | None = None
    detail: str | None = None


Result = Outcome | UnavailableError


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
    `failed_at`: when a batch last failed for the database's sake, on `time.monotonic`'s clock; None after a success.
    """

    failed_at: float | None = None

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        queue_events: int,
        queue_bytes: int,
        batch_events: int,
        timing: Timing = _TIMING,
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

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write batches meanwhile; at the end write what still waits, and take nothing more."""
        writer = asyncio.create_task(self._write_batches())
        try:
            yield
        finally:
            self._closing = True
            self._arrived.set()
            await writer

    async def submit(self, delivery: Delivery) -> Outcome:
        """Commit one delivery, together with whatever else waits.

        Raises `QueueFullError` at once, or `UnavailableError` when the database did not take it. Cancelling the
        caller does not take the delivery out of its batch.
        """
        size = len(delivery.content.body)
        full = self._events >= self._max_events or self._bytes + size > self._max_bytes
        if self._closing or (full and self._events > 0):
            raise QueueFullError
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
                results = await write(self._engine, deliveries, self._timing)
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


async def write(engine: AsyncEngine, deliveries: Sequence[Delivery], timing: Timing = _TIMING) -> list[Result]:
    """Commit these deliveries, in one transaction if they let us, and say of each what became of it.

    A delivery that cannot be stored is found by halving, and quarantined, while the others commit (I4).
    """
    try:
        return list(await _commit(engine, deliveries, timing))
    except SQLAlchemyError as error:
        if not is_data_error(error):
            return [_unavailable(error)] * len(deliveries)
        fault: Exception = error
    except TimeoutError:
        return [_silent()] * len(deliveries)
    except Exception as error:  # noqa: BLE001  # one event that breaks our own code must not break its batch either
        fault = error
    if len(deliveries) == 1:
        return [await _quarantine_alone(engine, deliveries[0], fault)]
    middle = len(deliveries) // 2
    return await write(engine, deliveries[:middle], timing) + await write(engine, deliveries[middle:], timing)


async def _commit(engine: AsyncEngine, deliveries: Sequence[Delivery], timing: Timing) -> list[Outcome]:
    started = perf_counter()
    async with asyncio.timeout(BATCH_SECONDS):
        outcomes = await run_in_transaction(engine, lambda connection: _store(connection, deliveries, timing))
    telemetry.commit_seconds.observe(perf_counter() - started)
    telemetry.batch_events.observe(len(deliveries))
    telemetry.duplicates.inc(sum(outcome.status == "duplicate" for outcome in outcomes))
    webhooks = [delivery.received_at for delivery in deliveries if delivery.source == events.WEBHOOK]
    if webhooks:
        telemetry.last_event.set(max(webhooks).timestamp())
    return outcomes


def _store(connection: Connection, deliveries: Sequence[Delivery], timing: Timing) -> list[Outcome]:
    rejects = [_reject(delivery) for delivery in deliveries if isinstance(delivery.content, Malformed)]
    observations = [
        ledger.Observation(delivery.content, delivery.received_at, delivery.source, delivery.key_id, delivery.count)
        for delivery in deliveries
        if isinstance(delivery.content, Event)
    ]
    recorded = iter(ledger.record(connection, observations, timing))
    quarantined = iter(quarantine.upsert_quarantine(connection, rejects))
    return [
        _outcome(delivery, delivery.content, next(recorded))
        if isinstance(delivery.content, Event)
        else Outcome("quarantined", next(quarantined), delivery.content.reason, delivery.content.detail)
        for delivery in deliveries
    ]


def _outcome(delivery: Delivery, event: Event, recorded: ledger.Recorded) -> Outcome:
    if not recorded.is_new:
        return Outcome("duplicate", recorded.id)
    is_known = event.type in events.CHAT_EVENTS or delivery.source != events.WEBHOOK
    return Outcome("stored" if is_known else "ignored", recorded.id)


def _reject(delivery: Delivery, reason: str = "", detail: str = "") -> Reject:
    content = delivery.content
    if isinstance(content, Malformed):
        reason, detail = content.reason, content.detail
    return Reject(content, reason, detail, delivery.received_at, delivery.key_id, delivery.source)


async def _quarantine_alone(engine: AsyncEngine, delivery: Delivery, fault: Exception) -> Result:
    reason, detail = _explain(fault)
    log.error("quarantined", reason=reason, detail=detail)
    rejects = [_reject(delivery, reason, detail)]
    try:
        async with asyncio.timeout(BATCH_SECONDS):
            (row_id,) = await run_in_transaction(
                engine, lambda connection: quarantine.upsert_quarantine(connection, rejects)
            )
    except SQLAlchemyError as error:
        return _unavailable(error)
    except TimeoutError:
        return _silent()
    return Outcome("quarantined", row_id, reason, detail)


def _explain(fault: Exception) -> tuple[str, str]:
    """A reason and a sentence that hold nothing of the event: a database error's own text may quote it."""
    state = sqlstate(fault)
    if state is not None or isinstance(fault, DBAPIError):
        return "not_storable", f"Postgres refused the event with SQLSTATE {state or 'unknown'}."
    return "not_processable", f"The archiver failed on the event with {type(fault).__name__}: please report it."


def _unavailable(error: SQLAlchemyError) -> UnavailableError:
    log.error("database unavailable", sqlstate=sqlstate(error), error=type(error).__name__, detail=explain(error))
    return UnavailableError()


def _silent() -> UnavailableError:
    log.error("database silent", seconds=BATCH_SECONDS)
    return UnavailableError()


def retry_quarantined(engine: Engine, quarantine_id: int, timing: Timing = _TIMING) -> Outcome | None:
    """Drive one quarantined delivery through the write path again; None where there is no such row.

    On success the ledger holds its bytes, with the time of its first delivery and the count of all, and the
    quarantine lets go of it; else the row stays, with today's reason. Raises what the database raises when it is
    not available.
    """
    try:
        with transaction(engine) as connection:
            outcome = _retry(connection, quarantine_id, timing)
    except Exception as error:
        if isinstance(error, SQLAlchemyError) and not is_data_error(error):
            raise
        outcome = Outcome("quarantined", quarantine_id, *_explain(error))
    if outcome is not None and outcome.status == "quarantined":
        with transaction(engine) as connection:
            quarantine.update_reason(connection, quarantine_id, outcome.reason or "", outcome.detail or "")
    return outcome


def _retry(connection: Connection, quarantine_id: int, timing: Timing) -> Outcome | None:
    row = quarantine.select_quarantined(connection, quarantine_id, lock=True)
    if row is None:
        return None
    event = _quarantined_event(row)
    if isinstance(event, Malformed):
        return Outcome("quarantined", quarantine_id, event.reason, event.detail)
    received_at = row["received_at"].astimezone(UTC)
    delivery = Delivery(event, received_at, row["key_id"], row["source"], row["delivery_count"])
    (outcome,) = _store(connection, [delivery], timing)
    quarantine.delete_quarantined(connection, quarantine_id)
    return outcome


def _quarantined_event(row: RowMapping) -> Event | Malformed:
    """A webhook is what its bytes say today; a fact of ours is what it was."""
    body = bytes(row["body"])
    if row["source"] == events.WEBHOOK:
        return events.parse(body)
    key = bytes(row["dedupe_key"])
    return Event(row["type"], body, key, row["session_id"], chat_id=None, chat=None, occurred_at=None)
