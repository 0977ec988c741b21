"""All connections of one process: how many there may be, and the one clock that all of their bounds go by."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from archiver import telemetry

LOOK_SECONDS = 0.25
SPARE = 256  # connections beyond the limit that are told so; any more are only closed
SHARE = 2  # of the limit one such part is for the connections of one address that have not proven a secret


class Member(Protocol):
    """One connection."""

    @property
    def address(self) -> str:
        """The client's."""

    @property
    def is_occupied(self) -> bool:
        """Whether a whole request of it is being answered."""

    def check(self, now: float, patience: float) -> None:
        """End it if it is overdue at `now`, on the event loop's clock."""

    def give_up(self) -> None:
        """End it at once, for another."""


class Crowd:
    """At most `limit` connections, each with `patience` seconds for a request's headers.

    Where there are as many, one that waits for a request gives way to a new one: first the oldest of those that have
    not proven a secret, then the one of the others that is unused longest. A part of the limit is the most that one
    address has of those that have not proven a secret: from then on it replaces its own.
    """

    def __init__(self, limit: int, patience: float) -> None:
        self._limit, self._patience = limit, patience
        self._most_of_address = max(1, limit // SHARE)
        self._members: set[Member] = set()
        self._unproven: dict[Member, None] = {}  # oldest first
        self._of_address: dict[str, dict[Member, None]] = {}  # of these, likewise
        self._proven: dict[Member, None] = {}  # the one unused longest first

    def admit(self, member: Member) -> bool:
        """Whether it is one of those that may stay; watched it is in any case."""
        self._members.add(member)
        telemetry.connections.set(len(self._members))
        same_address = self._of_address.get(member.address, {})
        if len(same_address) >= self._most_of_address:
            has_room = self._replace(same_address)
        elif self._admitted >= self._limit:
            has_room = self._replace(self._unproven) or self._replace(self._proven)
        else:
            has_room = True
        if has_room:
            self._unproven[member] = None
            self._of_address.setdefault(member.address, {})[member] = None
        return has_room

    def prove(self, member: Member) -> None:
        """Note that a request of it was authenticated."""
        if self._proven.pop(member, False) is None or self._leave_unproven(member):
            self._proven[member] = None

    def remove(self, member: Member) -> None:
        self._members.discard(member)
        self._proven.pop(member, None)
        self._leave_unproven(member)
        telemetry.connections.set(len(self._members))

    @property
    def is_beset(self) -> bool:
        return len(self._members) - self._admitted > SPARE

    @property
    def _admitted(self) -> int:
        return len(self._proven) + len(self._unproven)

    def _replace(self, members: Iterable[Member]) -> bool:
        """Whether one of these gave way."""
        given_up = next((member for member in members if not member.is_occupied), None)
        if given_up is None:
            return False
        self._proven.pop(given_up, None)
        self._leave_unproven(given_up)
        telemetry.connections_refused.labels("given_up").inc()
        given_up.give_up()
        return True

    def _leave_unproven(self, member: Member) -> bool:
        if member not in self._unproven:
            return False
        del self._unproven[member]
        same_address = self._of_address[member.address]
        del same_address[member]
        if not same_address:
            del self._of_address[member.address]
        return True

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
