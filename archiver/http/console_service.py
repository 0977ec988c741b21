"""Serve the console: beside the receiver, or in a process of its own."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.engine import URL
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from archiver import console, database, telemetry
from archiver.http import answers
from archiver.http.connection_limiter import ConnectionLimiter
from archiver.http.connections import mark_authenticated
from archiver.operations.reloading import Reloading
from archiver.settings import Settings

RECORDING_CONNECTIONS, READING_CONNECTIONS = 2, 3


class ConsoleService:
    """The engines and routes of the console.

    It has its own connections, so that pages and webhooks do not wait for each other.
    """

    def __init__(self, configuration: Settings, url: URL) -> None:
        self._configuration, prepared = configuration, configuration.prepared_statements
        self._recording = database.connect_async(url, pool_size=RECORDING_CONNECTIONS, prepared_statements=prepared)
        self._acting = database.connect(url, pool_size=1, prepared_statements=prepared)
        read_url = _read_url(configuration, url)
        self._reading = database.connect(read_url, pool_size=READING_CONNECTIONS, prepared_statements=prepared)

    def routes(self) -> Sequence[BaseRoute]:
        """Return the routes, with their whole paths."""
        engines = console.Engines(self._recording, self._acting, self._reading)
        return console.routes(self._configuration, engines, mark_authenticated)

    async def redirect(self, configuration: Settings, url: URL) -> None:
        """Use these database URLs for new connections."""
        database.redirect(self._recording, url)
        database.redirect(self._acting, url)
        database.redirect(self._reading, _read_url(configuration, url))
        await self.close()  # idle connections; those in use first complete their transaction

    async def close(self) -> None:
        """Close the connections."""
        await self._recording.dispose()
        for engine in (self._acting, self._reading):
            await asyncio.to_thread(engine.dispose)


def _read_url(configuration: Settings, url: URL) -> URL:
    """Return the URL of the database from which the console reads."""
    given = configuration.read_database_url
    return url if given is None else database.database_url(given.get_secret_value())


def create_console(configuration: Settings, url: URL, used: Mapping[str, str]) -> Starlette:
    """Build an application that consists of the console alone.

    `used`: digests of the settings files, taken before the settings were read. When such a file changes, and on
    SIGHUP, the database URLs are read again.
    """
    service = ConsoleService(configuration, url)
    limiter = ConnectionLimiter(configuration.max_connections, configuration.client_timeout)

    async def reload(new: Settings) -> None:
        given = new.database_url
        await service.redirect(new, url if given is None else database.database_url(given.get_secret_value()))

    files = Reloading(reload, used)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        telemetry.configure_logs(configuration.log_level, configuration.log_format)
        watching = asyncio.create_task(files.run())
        with limiter.enforcing():
            yield {"limiter": limiter}  # Uvicorn passes it to each connection
        watching.cancel()
        await asyncio.wait([watching])
        await service.close()

    handlers = {HTTPException: answers.respond_to_routing} | dict.fromkeys(answers.ERRORS, answers.respond)
    app = Starlette(routes=list(service.routes()), lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app
