"""`GET /readyz`: whether an event could be made durable now."""

import asyncio
import time

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from archiver.app.answers import RETRY_AFTER
from archiver.ingest import Ingest, database_fault
from archiver.spool import LEAST_ROOM, SpoolError

FAILURE_SECONDS = 15


class Readiness:
    """Ready: an event could be made durable now, by the database or by the spool."""

    def __init__(self, engine: AsyncEngine, ingest: Ingest) -> None:
        self._engine, self._ingest = engine, ingest

    async def readyz(self, _: Request) -> Response:
        """Which of the two would take an event, and if one does not, why."""
        told = {
            "database": await database_fault(self._engine) or self._commit_fault() or "ready",
            "spool": await asyncio.to_thread(self._spool_fault) or "ready",
        }
        if "ready" in told.values():
            return JSONResponse({"status": "ready"} | told)
        return JSONResponse({"status": "not ready"} | told, 503, RETRY_AFTER)

    def _commit_fault(self) -> str | None:
        """What the last batch met: without a spool not for long, since whoever is thought unready is sent no event
        that could prove the contrary.
        """
        failed_at, fallback = self._ingest.failed_at, self._ingest.fallback
        has_failed = failed_at is not None and time.monotonic() - failed_at < FAILURE_SECONDS
        is_away = fallback is not None and fallback.is_open
        return "the last events could not be committed: see the log" if has_failed or is_away else None

    def _spool_fault(self) -> str | None:
        if self._ingest.fallback is None:
            return "none"
        try:
            return "full" if self._ingest.fallback.spool.room() < LEAST_ROOM else None
        except SpoolError as error:
            return str(error)
