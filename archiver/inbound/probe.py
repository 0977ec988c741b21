"""Check whether Postgres accepts an event, by a query or a trial event that is rolled back."""

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import events, ledger
from archiver.database import explain, flush, is_untrusted, run_async, schema, sqlstate
from archiver.inbound.writing import SERVER_FIRST

PROBE_SECONDS = 3


class Fault(msgspec.Struct, frozen=True):
    """The reason why Postgres accepts no events.

    `reason` is public: it names no host, user or database. `detail` is for the log, and may name them.
    """

    reason: str
    detail: str


async def database_fault(engine: AsyncEngine) -> Fault | None:
    """Return the fault; None if Postgres responds, is writable and has the schema of this version.

    It does not detect a full disk, which only a write shows.
    """
    return await _fault(engine, _look)


async def trial_fault(engine: AsyncEngine) -> Fault | None:
    """Return the fault; None if Postgres stores a trial event in time. The trial event is rolled back."""
    try:
        return await _fault(engine, _try)
    except _RolledBackError:
        return None


async def _fault(engine: AsyncEngine, look: Callable[[Connection], bool]) -> Fault | None:
    try:
        # Postgres itself cancels a slow query, so that it blocks no other session afterwards.
        seconds = SERVER_FIRST * PROBE_SECONDS
        is_read_only = await run_async(engine, look, PROBE_SECONDS, statement_seconds=seconds)
    except TimeoutError:
        reason = f"silent for {PROBE_SECONDS} seconds"
        return Fault(reason, reason)
    except SQLAlchemyError as error:
        return Fault(f"unavailable: {_kind(error)}", f"unavailable: {explain(error)}")
    except schema.SchemaError as error:
        return Fault(error.reason, str(error))
    return Fault("read-only", "read-only") if is_read_only else None


def _kind(error: SQLAlchemyError) -> str:
    if is_untrusted(error):
        return "its certificate is not accepted"
    if (state := sqlstate(error)) is not None:
        return f"SQLSTATE {state}"
    return "the server refused the connection" if "FATAL: " in str(error) else "cannot be reached"


def _look(connection: Connection) -> bool:
    schema.check(connection)
    return connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"


class _RolledBackError(Exception):
    """The trial event was stored; this error rolls it back."""


def _try(connection: Connection) -> bool:
    if _look(connection):
        return True
    name = f"archiver-trial-{uuid4()}"
    chat = {"id": name, "sessionId": name, "input": "trial", "output": [{"role": "assistant", "content": "trial"}]}
    event = events.parse(msgspec.json.encode({"message": {"type": events.CREATED, "chat": chat}}))
    if not isinstance(event, events.Event):
        raise TypeError("The trial event cannot be read.")
    ledger.record(connection, [events.Delivery(event, datetime.now(UTC), None)])
    flush(connection)
    raise _RolledBackError
