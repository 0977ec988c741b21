"""Serve `GET /readyz`: whether an event can be stored durably."""

import asyncio
import time

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from archiver.http.answers import RETRY_AFTER
from archiver.inbound import Fault, Ingest, database_fault
from archiver.inbound.spool import MIN_ROOM_BYTES, SpoolError

FAILURE_SECONDS = 15
LOG_SECONDS = 60

log = structlog.get_logger(__name__)


class Readiness:
    """The route that reports whether an event can be stored in the database or in the spool.

    The response is public, so it contains only reasons; hosts, users and paths are only logged.
    """

    def __init__(self, engine: AsyncEngine, ingest: Ingest) -> None:
        self._engine, self._ingest = engine, ingest
        self._logged: dict[str, tuple[str, float]] = {}  # by part: the last logged detail and its time

    async def readyz(self, _: Request) -> Response:
        """Return 200 if the database or the spool can store an event, else 503; the body names the state of each."""
        faults = {
            "database": await database_fault(self._engine) or self._commit_fault(),
            "spool": await asyncio.to_thread(self._spool_fault),
        }
        self._log(faults)
        reasons = {part: "ready" if fault is None else fault.reason for part, fault in faults.items()}
        if None in faults.values():
            return JSONResponse({"status": "ready"} | reasons)
        return JSONResponse({"status": "not ready"} | reasons, 503, RETRY_AFTER)

    def _log(self, faults: dict[str, Fault | None]) -> None:
        """Log each fault whose detail is not in the response: when it appears or changes, then once a minute."""
        now = time.monotonic()
        for part, fault in faults.items():
            if fault is None or fault.detail == fault.reason:
                self._logged.pop(part, None)
                continue
            detail, at = self._logged.get(part, ("", now))
            if detail != fault.detail or now - at >= LOG_SECONDS:
                log.warning("not ready", part=part, reason=fault.detail)
                self._logged[part] = (fault.detail, now)

    def _commit_fault(self) -> Fault | None:
        """Return a fault while spooling and for `FAILURE_SECONDS` after a failed batch; then traffic can resume."""
        failed_at, fallback = self._ingest.failed_at, self._ingest.fallback
        has_failed = failed_at is not None and time.monotonic() - failed_at < FAILURE_SECONDS
        is_away = fallback is not None and fallback.is_open
        reason = "the last events could not be committed: see the log"
        return Fault(reason, reason) if has_failed or is_away else None

    def _spool_fault(self) -> Fault | None:
        if self._ingest.fallback is None:
            return Fault("none", "none")
        try:
            return Fault("full", "full") if self._ingest.fallback.spool.room() < MIN_ROOM_BYTES else None
        except SpoolError as error:
            return Fault(error.reason, str(error))
