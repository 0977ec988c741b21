"""A pool that limits concurrent calls; each call has its own connection."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from archiver.settings import SettingsError, libraries

CONNECT_SECONDS = 5.0
_IDLE = 2.0  # seconds that an idle connection is kept; servers keep it longer, so no call uses one that is closing


class ConnectionPool:
    """`number` HTTP clients with one connection each; the most recently used is reused first.

    A single client with a pool of this size would examine each socket before and after each call: a fifth of the cost
    of a call at 32 connections.
    """

    def __init__(self, number: int) -> None:
        trusted = httpx2.create_ssl_context()  # created once: this takes longer than a call
        self._clients = [_client(trusted) for _ in range(number)]
        self._free: asyncio.LifoQueue[httpx2.AsyncClient] = asyncio.LifoQueue()
        for client in self._clients:
            self._free.put_nowait(client)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Wait for a free client and yield it for one call."""
        client = await self._free.get()
        try:
            yield client
        finally:
            self._free.put_nowait(client)

    async def aclose(self) -> None:
        """Close every connection."""
        for client in self._clients:
            await client.aclose()


def _client(trusted: ssl.SSLContext) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        verify=trusted,
        headers={"user-agent": "callhq-archiver", "accept": "application/json", "accept-encoding": "gzip"},
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # the attempt as a whole has its own deadline
        limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE),
    )


def connection_pool(number: int) -> ConnectionPool:
    """Return a pool of `number` clients.

    Raises `SettingsError`, which names the variables to check, if a client cannot be built.
    """
    try:
        return ConnectionPool(number)
    except (ImportError, OSError, ValueError, TypeError, httpx2.InvalidURL) as error:
        advice = libraries.advice_on(error, libraries.TLS + libraries.PROXIES)
        raise SettingsError(
            f"the HTTP client for CallHQ cannot be built: {libraries.describe(error)}. To fix it, {advice}."
        ) from error
