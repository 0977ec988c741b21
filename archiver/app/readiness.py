"""`GET /readyz`: whether an event could be made durable now."""

import asyncio
import time

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from archiver import database, schema
from archiver.app.answers import RETRY_AFTER
from archiver.ingest import Ingest

READY_SECONDS = 3
FAILURE_SECONDS = 15


class Readiness:
    """Ready: an event could be committed now."""

    def __init__(self, engine: AsyncEngine, ingest: Ingest) -> None:
        self._engine, self._ingest = engine, ingest

    async def readyz(self, _: Request) -> Response:
        """Whether an event could be committed now, and if not, why."""
        fault = await self._fault()
        if fault is None:
            return JSONResponse({"status": "ready", "database": "ready"})
        answer = {"status": "not ready", "database": fault}
        return JSONResponse(answer, 503, RETRY_AFTER)

    async def _fault(self) -> str | None:
        try:
            async with asyncio.timeout(READY_SECONDS):
                is_read_only = await database.run_in_transaction(self._engine, _look)
        except TimeoutError:
            return f"silent for {READY_SECONDS} seconds"
        except SQLAlchemyError as error:
            return f"unavailable: {database.explain(error)}"
        except schema.SchemaError as error:
            return str(error)
        if is_read_only:
            return "read-only"
        # A full disk answers questions as ever, so what the last batch met counts too: but not for long, since
        # whoever is thought unready is sent no event that could prove the contrary.
        failed_at = self._ingest.failed_at
        has_failed = failed_at is not None and time.monotonic() - failed_at < FAILURE_SECONDS
        return "the last events could not be committed: see the log" if has_failed else None


def _look(connection: Connection) -> bool:
    schema.check(connection)
    return connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
