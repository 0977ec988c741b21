"""Retry quarantined deliveries through the write path."""

from datetime import UTC

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from archiver.archive import DEFAULT_TIMING, Timing
from archiver.database import is_conflict, is_data_error, is_lock_timeout, run, sqlstate, transaction
from archiver.events import Delivery, Malformed, restore
from archiver.inbound.writing import (
    QUERY_CANCELED,
    EventTooSlowError,
    Outcome,
    explain_fault,
    store,
)
from archiver.ledger import quarantine

LOCKED = "Another session locks the delivery or its conversation: retry later. `archiver doctor` names the session."
RETRY_SECONDS = 600.0  # per statement: more than the limit of a separately written event


def retry_quarantined(engine: Engine, quarantine_id: int, timing: Timing = DEFAULT_TIMING) -> Outcome | None:
    """Retry one quarantined delivery through the write path and return its outcome; None if there is no such row.

    On success the ledger contains its bytes with the time of the first delivery and the number of deliveries, and the
    row is deleted from the quarantine. Otherwise the row stays with the new reason, or unchanged if another session
    has locked it or its conversation. Raises the errors of an unavailable database.
    """
    try:
        outcome = run(
            engine, lambda connection: _retry(connection, quarantine_id, timing), statement_seconds=RETRY_SECONDS
        )
    except Exception as error:
        if is_lock_timeout(error) or is_conflict(error):
            return _locked(engine, quarantine_id)
        fault: Exception = EventTooSlowError(RETRY_SECONDS, 1) if sqlstate(error) == QUERY_CANCELED else error
        if isinstance(fault, SQLAlchemyError) and not is_data_error(fault):
            raise
        outcome = Outcome("quarantined", quarantine_id, *explain_fault(fault))
    if outcome is not None and outcome.status == "quarantined":
        reason, detail = outcome.reason or "", outcome.detail or ""
        try:
            run(engine, lambda connection: quarantine.update_reason(connection, quarantine_id, reason, detail))
        except SQLAlchemyError as error:
            if not is_lock_timeout(error):
                raise
    return outcome


def _locked(engine: Engine, quarantine_id: int) -> Outcome | None:
    with transaction(engine) as connection:
        row = quarantine.select_quarantined(connection, quarantine_id)
    return None if row is None else Outcome("quarantined", quarantine_id, row["reason"], LOCKED)


def _retry(connection: Connection, quarantine_id: int, timing: Timing) -> Outcome | None:
    row = quarantine.select_quarantined(connection, quarantine_id, lock=True)
    if row is None:
        return None
    content = restore(bytes(row["body"]), row["source"], row["type"], row["session_id"], row["dedupe_key"])
    if isinstance(content, Malformed):
        return Outcome("quarantined", quarantine_id, content.reason, content.detail)
    received_at = row["received_at"].astimezone(UTC)
    delivery = Delivery(content, received_at, row["key_id"], row["source"], row["delivery_count"])
    (outcome,) = store(connection, [delivery], timing, locks_late=True)
    quarantine.delete_quarantined(connection, quarantine_id)
    return outcome
