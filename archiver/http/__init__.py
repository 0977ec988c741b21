"""Serve HTTP: routes and responses. Only this package, and `console` for its pages, know status codes."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import structlog
from sqlalchemy.engine import URL
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from archiver import database, settings, telemetry
from archiver.archive import Timing
from archiver.database.connections import Connections
from archiver.database.identity import Guard, watch_identity
from archiver.database.lock_waits import report_waits
from archiver.http import answers
from archiver.http.bodies import Bodies
from archiver.http.connection_limiter import MAX_REFUSED, ConnectionLimiter
from archiver.http.console_service import ConsoleService, create_console
from archiver.http.metrics import Metrics, restore_last_event
from archiver.http.readiness import Readiness
from archiver.http.registration import Registration
from archiver.http.webhooks import Receiver
from archiver.inbound import CONNECTIONS, Ingest, signatures
from archiver.inbound.spool import SPOOL_FOLDER, Spool, SpoolError, open_spool, select_lost
from archiver.operations import reloading
from archiver.operations.audit_settings import record_settings
from archiver.operations.child_processes import exit_with_parent
from archiver.settings import Settings

__all__ = ["WEBHOOK_PATH", "Service", "create", "create_console", "healthz", "open_files"]

log = structlog.get_logger(__name__)

WEBHOOK_PATH = "/webhooks/callhq"
SPOOL_RETRY_SECONDS = 10.0
RESERVED_FILES = 256  # open files of a process besides its connections: libraries, logs, database connections


def open_files(configuration: Settings) -> int:
    """Return how many files a process may have open at the same time."""
    return configuration.max_connections + MAX_REFUSED + RESERVED_FILES


async def healthz(_: Request) -> Response:
    """Return 200 while the process runs; never use the database."""
    return JSONResponse({"status": "alive"})


class Service(Starlette):
    """The application: it routes requests, and passes webhooks directly to the receiver."""

    receiver: Receiver

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route one ASGI request."""
        if scope["type"] == "http" and scope["path"] == WEBHOOK_PATH and scope["method"] == "POST":
            await self.receiver(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create(
    configuration: Settings | None = None,
    used: Mapping[str, str] | None = None,
    forward: Callable[[], None] | None = None,
) -> Service:
    """Build the service from the settings. It opens nothing until the server starts it.

    `used`: digests of the settings files, taken before the settings were read. `forward` passes SIGHUP on to other
    processes. Raises `SettingsError` if a setting is missing or invalid.
    """
    used = reloading.look() if used is None else used
    parts = _Parts(configuration or settings.read(), used, forward)
    app = Service(
        routes=[
            Route(WEBHOOK_PATH, parts.receiver, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", parts.readiness.readyz),
            Route("/metrics", Metrics().respond),
            Route("/sessions", parts.registration.register, methods=["POST"]),
            *([] if parts.console is None else parts.console.routes()),
        ],
        lifespan=parts.lifespan,
        exception_handlers={HTTPException: answers.respond_to_routing}
        | dict.fromkeys(answers.ERRORS, answers.respond),
    )
    app.receiver = parts.receiver
    app.router.redirect_slashes = False  # a redirect loses the body of a client that does not follow it
    return app


class _Parts:
    """The parts of one receiving process, from its engines to the handlers of its routes."""

    def __init__(self, configuration: Settings, used: Mapping[str, str], forward: Callable[[], None] | None) -> None:
        if configuration.database_url is None:
            raise settings.SettingsError(
                "DATABASE_URL is not set. `archiver serve` sets it for the embedded database."
            )
        self._configuration = configuration
        self._url = database.database_url(configuration.database_url.get_secret_value())
        verifier = signatures.verifier(configuration)
        prepared = configuration.prepared_statements
        self._writing = database.connect_async(self._url, pool_size=CONNECTIONS, prepared_statements=prepared)
        # Readiness has separate connections, so that a busy writer does not make the service look dead.
        self._probing = database.connect_async(self._url, pool_size=2, prepared_statements=prepared)
        self.console = None if configuration.console == "off" else ConsoleService(configuration, self._url)
        self._ingest = Ingest(
            self._writing,
            queue_events=configuration.queue_events,
            queue_bytes=configuration.queue_bytes,
            batch_events=configuration.batch_events,
            timing=Timing.of(configuration),
        )
        self._limiter = ConnectionLimiter(configuration.max_connections, configuration.client_timeout)
        self._guard = Guard(configuration.home.resolve(), self._url)
        self._files = reloading.Reloading(self._reload, used, forward)
        bodies = Bodies(configuration.max_body, configuration.queue_bytes)
        self.receiver = Receiver(configuration, verifier, bodies, self._ingest)
        self.registration = Registration(configuration.api_token.get_secret_value(), bodies, self._ingest)
        self.readiness = Readiness(self._probing, self._ingest)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        """Run ingest, background tasks and connection limits; at the end close the spool and all connections."""
        configuration, ingest = self._configuration, self._ingest
        telemetry.configure_logs(configuration.log_level, configuration.log_format)
        exit_with_parent()
        _reduce_garbage_collection()
        log.info("receiving process started", pid=os.getpid())
        async with ingest.running(_open_spool(configuration)):
            work = [
                report_waits(self._probing),
                self._files.run(),
                watch_identity(self._probing, self._guard),
                _watch_spool(configuration, ingest),
                restore_last_event(self._probing),
            ]
            tasks = set(map(asyncio.create_task, work))
            with self._limiter.enforcing():
                yield {"limiter": self._limiter}  # Uvicorn passes it to each connection
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if ingest.fallback is not None:
            ingest.fallback.spool.close()
        await self._writing.dispose()
        await self._probing.dispose()
        if self.console is not None:
            await self.console.close()
        log.info("receiver stopped", pid=os.getpid())

    async def _reload(self, new: Settings) -> None:
        """Apply new secrets, token and database URL; other settings take effect at the next start."""
        if new.webhook_scheme == "none" != self._configuration.webhook_scheme:
            raise settings.SettingsError(
                "ARCHIVER_WEBHOOK_SCHEME is none. To accept unsigned deliveries, start serve with --insecure."
            )
        verifier = signatures.verifier(new)
        at = self._url if new.database_url is None else database.database_url(new.database_url.get_secret_value())
        self.receiver.use(new, verifier)
        self.registration.use(new.api_token.get_secret_value())
        for engine in (self._writing, self._probing):
            database.redirect(engine, at)
            await engine.dispose()  # closes idle connections; those in use first complete their transaction
        if self.console is not None:
            await self.console.redirect(new, at)
        await asyncio.to_thread(_record_settings, new, at)


async def _watch_spool(configuration: Settings, ingest: Ingest) -> None:
    """Until cancelled, try to open a missing spool, and update the metric of lost events."""
    folder = configuration.home.resolve() / SPOOL_FOLDER
    while configuration.spool != "off":
        telemetry.spool_lost.set((await asyncio.to_thread(select_lost, folder)).events)
        await asyncio.sleep(SPOOL_RETRY_SECONDS)
        if ingest.fallback is None:
            spool = await asyncio.to_thread(_open_spool, configuration)
            if spool is not None:
                log.info("spool available again", file=spool.path.name)
                ingest.add_spool(spool)


def _open_spool(configuration: Settings) -> Spool | None:
    """Open the spool; return None if it is off or cannot be opened: the receiver then runs without a spool."""
    if configuration.spool == "off":
        return None
    try:
        return open_spool(configuration.home.resolve() / SPOOL_FOLDER, configuration.spool_bytes)
    except SpoolError as error:
        log.error("spool unavailable; events are rejected while the database is unavailable", reason=str(error))  # noqa: TRY400  # a traceback would add nothing
        return None


def _record_settings(configuration: Settings, url: URL) -> None:
    with Connections(url, configuration.prepared_statements).synchronous() as engine:
        record_settings(engine, configuration, "serve")


def _reduce_garbage_collection() -> None:
    """Reduce garbage collection: requests create no cycles, and collecting took a tenth of the time of each event."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
