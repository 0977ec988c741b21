"""How fast one process sends, over all its subscriptions: what happens after ingest must leave ingest its share."""

import asyncio
from collections.abc import Callable
from time import monotonic

LONGEST_SECONDS = 1.0  # that somebody waits: what is to be sent must not grow old meanwhile
_BURST_SECONDS = 0.05  # that may be made up for: a loop that was late a little does not lose its turns


class Pace:
    """At most so many turns a second, evenly, first come, first served; 0: no limit."""

    def __init__(self, rate: float, clock: Callable[[], float] = monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._clock = clock
        self._next = 0.0

    async def turn(self) -> bool:
        """Return when it is one's turn; or, without one, after a while, where there are too many before."""
        if not self._interval:
            return True
        now = self._clock()
        mine = max(self._next, now - _BURST_SECONDS)
        if mine - now > max(LONGEST_SECONDS, self._interval):
            await asyncio.sleep(LONGEST_SECONDS)
            return False
        self._next = mine + self._interval
        if mine > now:
            await asyncio.sleep(mine - now)
        return True
