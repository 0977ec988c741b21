"""Deliveries to Postgres: one transaction for all of them if they let us, and for each what became of it."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from time import perf_counter
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import events, ledger, quarantine, telemetry
from archiver.database import explain, is_data_error, run_in_transaction, sqlstate
from archiver.events import Event, Malformed
from archiver.projection import DEFAULT_TIMING, Timing
from archiver.quarantine import Reject

log = structlog.get_logger(__name__)

BATCH_SECONDS = 60  # after which a database that says nothing at all counts as gone

Status = Literal["stored", "duplicate", "ignored", "quarantined"]


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


async def write(engine: AsyncEngine, deliveries: Sequence[Delivery], timing: Timing = DEFAULT_TIMING) -> list[Result]:
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
        outcomes = await run_in_transaction(engine, lambda connection: store(connection, deliveries, timing))
    telemetry.commit_seconds.observe(perf_counter() - started)
    telemetry.batch_events.observe(len(deliveries))
    telemetry.duplicates.inc(sum(outcome.status == "duplicate" for outcome in outcomes))
    webhooks = [delivery.received_at for delivery in deliveries if delivery.source == events.WEBHOOK]
    if webhooks:
        telemetry.last_event.set(max(webhooks).timestamp())
    return outcomes


def store(connection: Connection, deliveries: Sequence[Delivery], timing: Timing) -> list[Outcome]:
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
    reason, detail = explain_fault(fault)
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


def explain_fault(fault: Exception) -> tuple[str, str]:
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
