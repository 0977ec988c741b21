"""Provide an event loop whose listening sockets close without dropping accepted connections.

Uvicorn creates its server only from its configuration, including in each process of `--workers N`. The configuration
cannot replace the server, but it can choose the event loop.
"""

import asyncio
import socket
from typing import Any

import uvloop


class DrainingLoop(uvloop.Loop):
    """A uvloop event loop with `is_draining`, which is set when one of its servers is closed."""

    is_draining = False

    async def create_server(self, protocol_factory: Any, *args: Any, sock: Any = None, **options: Any) -> Any:
        if sock is None:
            return await super().create_server(protocol_factory, *args, **options)
        server = await super().create_server(protocol_factory, sock=sock, **options)
        queue = sock.dup()
        queue.setblocking(False)
        return _DrainingServer(self, server, queue, protocol_factory)


class _DrainingServer:
    """A server that, when closed, still serves the connections that the kernel has accepted."""

    def __init__(
        self, loop: DrainingLoop, server: asyncio.AbstractServer, queue: socket.socket, factory: Any
    ) -> None:
        self._loop, self._server, self._queue, self._factory = loop, server, queue, factory
        self._accepting: list[asyncio.Task[Any]] = []

    def close(self) -> None:
        self._loop.is_draining = True
        self._server.close()
        with self._queue:
            while True:
                try:
                    connection, _ = self._queue.accept()
                except OSError:  # no waiting client, or no free file descriptor
                    return
                accepting = self._loop.connect_accepted_socket(self._factory, connection)
                self._accepting.append(self._loop.create_task(accepting))

    async def wait_closed(self) -> None:
        await self._server.wait_closed()
