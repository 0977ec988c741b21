"""Serve `GET /metrics`. It needs no secret, so its cost is limited: it must not delay webhooks."""

import asyncio

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import Response

from archiver import ledger, telemetry
from archiver.database import run_async

RETRY_SECONDS = 5.0  # between two attempts to read the ledger
REST = 9  # pause after a response, as a multiple of the time to build it: responses take at most a tenth of the time


class Metrics:
    """The route of all metrics as Prometheus text. Waiting requests share one response, built after they arrive."""

    def __init__(self) -> None:
        self._next: asyncio.Task[bytes] | None = None
        self._rests_until = 0.0  # in the event loop's time

    async def respond(self, _: Request) -> Response:
        """Return all metrics as Prometheus text."""
        if self._next is None:
            self._next = asyncio.create_task(self._read())
        body = await asyncio.shield(self._next)  # other requests also wait for it
        return Response(body, media_type=telemetry.CONTENT_TYPE)

    async def _read(self) -> bytes:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(self._rests_until - loop.time(), 0))
        self._next = None  # for a request that arrives from now on
        begun = loop.time()
        result = telemetry.metrics()
        self._rests_until = loop.time() + REST * (loop.time() - begun)
        return result


async def restore_last_event(engine: AsyncEngine) -> None:
    """Set the time of the last event from the ledger after a restart. Retries while the database is unavailable."""
    while True:
        try:
            newest = await run_async(
                engine, ledger.select_last_webhook, RETRY_SECONDS, statement_seconds=RETRY_SECONDS
            )
        except (SQLAlchemyError, TimeoutError):  # reported by ingest and by /readyz
            await asyncio.sleep(RETRY_SECONDS)
        else:
            if newest is not None:
                telemetry.last_event.set(newest.timestamp())
            return
