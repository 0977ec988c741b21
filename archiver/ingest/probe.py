"""Whether Postgres would take an event now, without giving it one."""

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import schema
from archiver.database import explain, is_untrusted, run_in_transaction, sqlstate

PROBE_SECONDS = 3


class Fault(msgspec.Struct, frozen=True):
    """Why Postgres takes no event.

    `reason` is for anyone who asks: it names no host, user or database. `detail`, for the log, does.
    """

    reason: str
    detail: str


async def database_fault(engine: AsyncEngine) -> Fault | None:
    """Return why not; None if it answers, lets us write, and has the schema of this version.

    A full disk answers questions as before: that shows only when something is written.
    """
    try:
        is_read_only = await run_in_transaction(engine, _look, PROBE_SECONDS)
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
