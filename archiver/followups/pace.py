"""How fast one process sends, over all its subscriptions: what happens after ingest must leave ingest its share."""

import asyncio
from collections.abc import Callable
from time import monotonic

_BURST_SECONDS = 0.05  # that may be made up for: a loop that was late a little does not lose its turns


class Pace:
    """At most so many turns a second, evenly, first come, first served; 0: no limit."""

    def __init__(self, rate: float, clock: Callable[[], float] = monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._clock = clock
        self._next = 0.0

    async def turn(self) -> None:
        """Return when it is one's turn."""
        if not self._interval:
            return
        now = self._clock()
        mine = max(self._next, now - _BURST_SECONDS)
        self._next = mine + self._interval
        if mine > now:
            await asyncio.sleep(mine - now)
