"""All connections of one process: how many there may be, and the one clock that all of their bounds go by."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from archiver import telemetry

LOOK_SECONDS = 0.25
SPARE = 256  # connections beyond the limit that are told so; any more are only closed


class Member(Protocol):
    """One connection."""

    def check(self, now: float, patience: float) -> None:
        """End it if it is overdue at `now`, on the event loop's clock."""


class Crowd:
    """At most `limit` connections, each with `patience` seconds for a request's headers."""

    def __init__(self, limit: int, patience: float) -> None:
        self._limit, self._patience = limit, patience
        self._members: set[Member] = set()
        self._admitted: set[Member] = set()

    def admit(self, member: Member) -> bool:
        """Whether it is one of those that may stay; watched it is in any case."""
        self._members.add(member)
        telemetry.connections.set(len(self._members))
        has_room = len(self._admitted) < self._limit
        if has_room:
            self._admitted.add(member)
        return has_room

    def remove(self, member: Member) -> None:
        self._members.discard(member)
        self._admitted.discard(member)
        telemetry.connections.set(len(self._members))

    @property
    def is_beset(self) -> bool:
        return len(self._members) - len(self._admitted) > SPARE

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Overdue connections are ended meanwhile; by one timer, so that no request pays for one of its own."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            timer = loop.call_later(LOOK_SECONDS, look)  # first, so that a failure does not end the watch
            now = loop.time()
            for member in tuple(self._members):
                member.check(now, self._patience)

        timer = loop.call_later(LOOK_SECONDS, look)
        try:
            yield
        finally:
            timer.cancel()
