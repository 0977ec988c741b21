"""Limit the connections of one process and enforce their deadlines with one timer."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from archiver import telemetry

SWEEP_SECONDS = 0.25
MAX_REFUSED = 256  # connections beyond the limit that get an error response; further ones are only closed
ADDRESS_SHARE = 2  # divisor of the limit, for the unauthenticated connections of one address


class LimitedConnection(Protocol):
    """A connection that `ConnectionLimiter` can close."""

    @property
    def address(self) -> str:
        """Return the client's address."""

    @property
    def is_occupied(self) -> bool:
        """Return whether a complete request is waiting for its response."""

    def check(self, now: float, timeout: float) -> None:
        """Close the connection if it is overdue at `now` (clock of the event loop)."""

    def evict(self) -> None:
        """Close immediately, to make room for another connection."""


class ConnectionLimiter:
    """A limiter that allows at most `limit` connections, each with `timeout` seconds for the headers of a request.

    At the limit, a new connection replaces an idle one: first the oldest unauthenticated one, then the authenticated
    one that has been idle longest. The unauthenticated connections of one address are limited to a share of the
    limit; beyond that, a new one replaces an older one of the same address.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self._limit, self._timeout = limit, timeout
        self._max_per_address = max(1, limit // ADDRESS_SHARE)
        self._connections: set[LimitedConnection] = set()
        self._unauthenticated: dict[LimitedConnection, None] = {}  # oldest first
        self._unauthenticated_by_address: dict[str, dict[LimitedConnection, None]] = {}  # of these, oldest first
        self._authenticated: dict[LimitedConnection, None] = {}  # idle longest first

    def admit(self, connection: LimitedConnection) -> bool:
        """Register a connection; return whether it may stay open."""
        self._connections.add(connection)
        telemetry.connections.set(len(self._connections))
        same_address = self._unauthenticated_by_address.get(connection.address, {})
        if len(same_address) >= self._max_per_address:
            has_room = self._replace(same_address)
        elif self._admitted >= self._limit:
            has_room = self._replace(self._unauthenticated) or self._replace(self._authenticated)
        else:
            has_room = True
        if has_room:
            self._unauthenticated[connection] = None
            self._unauthenticated_by_address.setdefault(connection.address, {})[connection] = None
        return has_room

    def mark_authenticated(self, connection: LimitedConnection) -> None:
        """Mark a connection as authenticated."""
        if self._authenticated.pop(connection, False) is None or self._discard_unauthenticated(connection):
            self._authenticated[connection] = None

    def remove(self, connection: LimitedConnection) -> None:
        self._connections.discard(connection)
        self._authenticated.pop(connection, None)
        self._discard_unauthenticated(connection)
        telemetry.connections.set(len(self._connections))

    @property
    def is_saturated(self) -> bool:
        return len(self._connections) - self._admitted > MAX_REFUSED

    @property
    def _admitted(self) -> int:
        return len(self._authenticated) + len(self._unauthenticated)

    def _replace(self, connections: Iterable[LimitedConnection]) -> bool:
        """Close the first of these connections that is idle; return whether there was one."""
        evicted = next((connection for connection in connections if not connection.is_occupied), None)
        if evicted is None:
            return False
        self._authenticated.pop(evicted, None)
        self._discard_unauthenticated(evicted)
        telemetry.connections_refused.labels("given_up").inc()
        evicted.evict()
        return True

    def _discard_unauthenticated(self, connection: LimitedConnection) -> bool:
        if connection not in self._unauthenticated:
            return False
        del self._unauthenticated[connection]
        same_address = self._unauthenticated_by_address[connection.address]
        del same_address[connection]
        if not same_address:
            del self._unauthenticated_by_address[connection.address]
        return True

    @contextmanager
    def enforcing(self) -> Iterator[None]:
        """Close overdue connections during the block, with one timer for all of them."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def sweep() -> None:
            nonlocal timer
            # scheduled first, so that a failure does not stop the timer
            timer = loop.call_later(SWEEP_SECONDS, sweep)
            now = loop.time()
            for connection in tuple(self._connections):
                connection.check(now, self._timeout)

        timer = loop.call_later(SWEEP_SECONDS, sweep)
        try:
            yield
        finally:
            timer.cancel()
