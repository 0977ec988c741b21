"""A pool that limits concurrent calls; each has a connection of its own."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from archiver.settings import SettingsError

CONNECT_SECONDS = 5.0
_IDLE = 2.0  # seconds that a connection is kept unused: less than servers keep it, so that none is used as it ends


class ConnectionPool:
    """`number` HTTP clients with one connection each; the last used is reused first.

    One client with a pool of as many would look at each of their sockets before and after each call: a fifth of what
    a call costs at 32.
    """

    def __init__(self, number: int) -> None:
        trusted = httpx2.create_ssl_context()  # made once: that takes longer than a call
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
        """End every connection."""
        for client in self._clients:
            await client.aclose()


def _client(trusted: ssl.SSLContext) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        verify=trusted,
        headers={"user-agent": "callhq-archiver", "accept": "application/json", "accept-encoding": "gzip"},
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # the whole of an attempt has a deadline of its own
        limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE),
    )


# What the HTTP client reads from the environment by itself, in capitals or not.
_ENVIRONMENT = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")


def connection_pool(number: int) -> ConnectionPool:
    """Return so many clients. Raises `SettingsError`, which names the variables to check, where none can be built."""
    try:
        return ConnectionPool(number)
    except (ImportError, OSError, ValueError, TypeError, httpx2.InvalidURL) as error:
        variables = sorted(name for name in os.environ if name.lower() in _ENVIRONMENT)
        advice = (
            f"check {', '.join(variables)} in the environment"
            if variables
            else "see the libraries that are installed"
        )
        detail = " ".join(str(error).split()).rstrip(".") or "no further detail"
        raise SettingsError(
            f"The HTTP client for CallHQ cannot be built: {type(error).__name__}: {detail}. To correct it, {advice}."
        ) from error
