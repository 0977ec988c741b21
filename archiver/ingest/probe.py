"""Whether Postgres would take an event now, without giving it one."""

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver import schema
from archiver.database import explain, run_in_transaction

PROBE_SECONDS = 3


async def database_fault(engine: AsyncEngine) -> str | None:
    """Why not; None if it answers, lets us write, and has the schema of this version.

    A full disk answers questions as ever: that shows only when something is written.
    """
    try:
        is_read_only = await run_in_transaction(engine, _look, PROBE_SECONDS)
    except TimeoutError:
        return f"silent for {PROBE_SECONDS} seconds"
    except SQLAlchemyError as error:
        return f"unavailable: {explain(error)}"
    except schema.SchemaError as error:
        return str(error)
    return "read-only" if is_read_only else None


def _look(connection: Connection) -> bool:
    schema.check(connection)
    return connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
