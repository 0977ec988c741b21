"""Write deliveries to Postgres, in one transaction if possible, and return an outcome for each."""

from collections.abc import Sequence
from time import perf_counter
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import events, ledger, telemetry
from archiver.archive import DEFAULT_TIMING, Timing
from archiver.database import (
    LOCK_SECONDS,
    STATEMENT_SECONDS,
    clock,
    explain,
    is_connection_failure,
    is_data_error,
    run_async,
    sqlstate,
)
from archiver.errors import ArchiverError
from archiver.events import Content, Delivery, Event, Malformed, has_event
from archiver.ledger import quarantine

log = structlog.get_logger(__name__)

BATCH_SECONDS = 60.0  # after which a transaction is abandoned
# Facts without a session id take the recording lock exclusively, so every other writer waits for them.
EXCLUSIVE_SECONDS = 2.0
# Fractions of a limit: Postgres cancels a statement before the client abandons the connection, and a lock wait even
# earlier, so that the cause is known.
SERVER_FIRST, LOCKS_FIRST = 0.9, 0.5

QUERY_CANCELED, LOCK_NOT_AVAILABLE, DISK_FULL = "57014", "55P03", "53100"

Status = Literal["stored", "duplicate", "ignored", "quarantined", "spooled"]


class UnavailableError(ArchiverError):
    """The database did not accept an event."""

    message = "The database did not accept the event; send it again."

    def __init__(
        self, *, sqlstate: str | None = None, is_silent: bool = False, is_disconnected: bool = False
    ) -> None:
        super().__init__()
        self.is_disconnected = is_disconnected
        self.is_slow = is_silent or sqlstate == QUERY_CANCELED  # it used its whole time limit
        self.is_locked = sqlstate == LOCK_NOT_AVAILABLE
        self.is_disk_full = sqlstate == DISK_FULL


class EventTooSlowError(ArchiverError):
    """Postgres did not store an event within its separate time limit."""

    def __init__(self, seconds: float, attempts: int) -> None:
        super().__init__(
            f"Postgres did not store the event within {seconds:g} s in any of {attempts} separate attempts."
        )


class EventNotStoredError(ArchiverError):
    """Postgres failed repeatedly on one event while it stored others."""

    def __init__(self, attempts: int) -> None:
        super().__init__(
            f"Postgres failed on the event in {attempts} separate attempts, while it stored another event."
        )


class Outcome(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The outcome of a delivery. `id`: its ledger row, or quarantine row if `quarantined`; 0 if there is none.

    Its JSON is the response to the sender.
    """

    status: Status
    id: int = 0
    reason: str | None = None
    detail: str | None = None


Result = Outcome | UnavailableError


class Limits(msgspec.Struct, frozen=True):
    """The limits of a transaction.

    `seconds`: of the whole transaction. `is_alone`: its only delivery may be slow, so it must not hold a lock that
    blocks all others.
    """

    seconds: float = BATCH_SECONDS
    is_alone: bool = False

    @property
    def statement_seconds(self) -> float:
        return min(SERVER_FIRST * self.seconds, STATEMENT_SECONDS)

    @property
    def lock_seconds(self) -> float:
        return min(LOCKS_FIRST * self.seconds, LOCK_SECONDS)


async def write(
    engine: AsyncEngine,
    deliveries: Sequence[Delivery[Content]],
    timing: Timing = DEFAULT_TIMING,
    seconds: float | None = None,
) -> list[Result]:
    """Commit these deliveries, in one transaction if possible, and return the outcome of each.

    A delivery that cannot be stored is isolated by halving and quarantined, while the others commit (I4). A
    transaction is abandoned after `seconds`. Deliveries without a session id use a separate, short transaction, which
    blocks all others.
    """
    limits = Limits(seconds or BATCH_SECONDS)
    apart = [place for place, delivery in enumerate(deliveries) if _is_exclusive(delivery)]
    if not apart:
        return await _write(engine, deliveries, timing, limits)
    results: dict[int, Result] = {}
    together = sorted(set(range(len(deliveries))) - set(apart))
    exclusive = Limits(min(limits.seconds, EXCLUSIVE_SECONDS))
    for places, limit in ((together, limits), (apart, exclusive)):
        if places:
            written = await _write(engine, [deliveries[place] for place in places], timing, limit)
            results |= zip(places, written, strict=True)
    return [results[place] for place in range(len(deliveries))]


async def write_isolated(engine: AsyncEngine, delivery: Delivery[Content], timing: Timing, seconds: float) -> Result:
    """Commit one delivery within `seconds`, and return its outcome; only its own session waits for it."""
    (result,) = await _write(engine, [delivery], timing, Limits(seconds, is_alone=True))
    return result


async def quarantine_delivery(engine: AsyncEngine, delivery: Delivery[Content], fault: Exception) -> Result:
    """Quarantine a delivery that was parsed but cannot be stored, and return its outcome."""
    return await _quarantine_alone(engine, delivery, fault, Limits(LOCK_SECONDS))


def _is_exclusive(delivery: Delivery[Content]) -> bool:
    event = delivery.content
    return isinstance(event, Event) and not event.session_id and event.type in events.CHAT_EVENTS


async def _write(
    engine: AsyncEngine, deliveries: Sequence[Delivery[Content]], timing: Timing, limits: Limits
) -> list[Result]:
    try:
        return list(await _commit(engine, deliveries, timing, limits))
    except SQLAlchemyError as error:
        if not is_data_error(error):
            return [_unavailable(error)] * len(deliveries)
        fault: Exception = error
    except TimeoutError:
        return [_silent(limits.seconds)] * len(deliveries)
    except Exception as error:  # noqa: BLE001  # an event that triggers a defect must not fail its batch
        fault = error
    if len(deliveries) == 1:
        return [await _quarantine_alone(engine, deliveries[0], fault, limits)]
    middle = len(deliveries) // 2
    first = await _write(engine, deliveries[:middle], timing, limits)
    return first + await _write(engine, deliveries[middle:], timing, limits)


async def _commit(
    engine: AsyncEngine, deliveries: Sequence[Delivery[Content]], timing: Timing, limits: Limits
) -> list[Outcome]:
    started = perf_counter()
    outcomes = await run_async(
        engine,
        lambda connection: store(connection, deliveries, timing, locks_late=limits.is_alone),
        limits.seconds,
        statement_seconds=limits.statement_seconds,
        lock_seconds=limits.lock_seconds,
    )
    telemetry.commit_seconds.observe(perf_counter() - started)
    telemetry.batch_events.observe(len(deliveries))
    telemetry.duplicates.inc(sum(outcome.status == "duplicate" for outcome in outcomes))
    telemetry.refused_erased.inc(sum(outcome.reason == "erased" for outcome in outcomes))
    _count_without_text(deliveries, outcomes)
    webhooks = [delivery.received_at for delivery in deliveries if delivery.source == events.WEBHOOK]
    if webhooks:
        telemetry.last_event.set(max(webhooks).timestamp())
    return outcomes


def _count_without_text(deliveries: Sequence[Delivery[Content]], outcomes: Sequence[Outcome]) -> None:
    for delivery, outcome in zip(deliveries, outcomes, strict=True):
        chat = delivery.content.chat if isinstance(delivery.content, Event) else None
        for message in chat.input + chat.output if chat is not None and outcome.status == "stored" else ():
            if not message.has_text:
                telemetry.messages_without_text.labels(message.shape).inc()


def store(
    connection: Connection, deliveries: Sequence[Delivery[Content]], timing: Timing, *, locks_late: bool = False
) -> list[Outcome]:
    """Store deliveries in this transaction and return their outcomes. `locks_late`: see `ledger.record`."""
    deliveries = [_without_future(delivery) for delivery in deliveries]
    parsed = [delivery for delivery in deliveries if has_event(delivery)]
    malformed = [delivery for delivery in deliveries if isinstance(delivery.content, Malformed)]
    recorded = iter(ledger.record(connection, parsed, timing, locks_late=locks_late))
    quarantined = iter(quarantine.upsert_quarantine(connection, malformed))
    return [
        Outcome("quarantined", next(quarantined), delivery.content.reason, delivery.content.detail)
        if isinstance(delivery.content, Malformed)
        else _outcome(delivery, delivery.content, next(recorded))
        for delivery in deliveries
    ]


def _without_future(delivery: Delivery[Content]) -> Delivery[Content]:
    """Return the delivery, with an arrival time that is not in the future on the database's clock."""
    received_at = clock.at_most_now(delivery.received_at)
    if received_at is delivery.received_at:
        return delivery
    return msgspec.structs.replace(delivery, received_at=received_at)


def _outcome(delivery: Delivery[Content], event: Event, recorded: ledger.Recorded) -> Outcome:
    if recorded.is_erased:
        return Outcome("ignored", reason="erased")
    if not recorded.is_new:
        return Outcome("duplicate", recorded.id)
    is_known = event.type in events.CHAT_EVENTS or delivery.source != events.WEBHOOK
    return Outcome("stored" if is_known else "ignored", recorded.id)


async def _quarantine_alone(
    engine: AsyncEngine, delivery: Delivery[Content], fault: Exception, limits: Limits
) -> Result:
    reason, detail = explain_fault(fault)
    try:
        row_id = await run_async(
            engine,
            lambda connection: _quarantine_unless_erased(connection, delivery, reason, detail),
            limits.seconds,
            statement_seconds=limits.statement_seconds,
            lock_seconds=limits.lock_seconds,
        )
    except SQLAlchemyError as error:
        return _unavailable(error)
    except TimeoutError:
        return _silent(limits.seconds)
    if row_id is None:
        telemetry.refused_erased.inc()
        return Outcome("ignored", reason="erased")
    log.error("delivery quarantined", reason=reason, detail=detail)
    return Outcome("quarantined", row_id, reason, detail)


def _quarantine_unless_erased(
    connection: Connection, delivery: Delivery[Content], reason: str, detail: str
) -> int | None:
    """Quarantine the delivery and return its id; None if its content was erased."""
    if has_event(delivery) and ledger.is_refused(connection, delivery):
        return None
    (row_id,) = quarantine.upsert_quarantine(connection, [_without_future(delivery)], reason, detail)
    return row_id


def explain_fault(fault: Exception) -> tuple[str, str]:
    """Return a reason and a sentence. They do not quote the error, whose text may contain content of the event."""
    if isinstance(fault, EventTooSlowError):
        return quarantine.TOO_SLOW, str(fault)
    if isinstance(fault, EventNotStoredError):
        return quarantine.NOT_STORABLE, str(fault)
    state = sqlstate(fault)
    if state is not None or isinstance(fault, DBAPIError):
        return quarantine.NOT_STORABLE, f"Postgres refused the event with SQLSTATE {state or 'unknown'}."
    return (
        quarantine.NOT_PROCESSABLE,
        f"The archiver failed on the event with {type(fault).__name__}: please report it.",
    )


def _unavailable(error: SQLAlchemyError) -> UnavailableError:
    fault = UnavailableError(sqlstate=sqlstate(error), is_disconnected=is_connection_failure(error))
    what = "transaction too slow" if fault.is_slow or fault.is_locked else "database unavailable"
    log.error(what, sqlstate=sqlstate(error), error=type(error).__name__, detail=explain(error))
    return fault


def _silent(seconds: float) -> UnavailableError:
    log.error("transaction timed out", seconds=seconds)
    return UnavailableError(is_silent=True)
