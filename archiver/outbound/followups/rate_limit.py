"""Limit the delivery rate of one process, so that ingest keeps its share."""

import asyncio
from collections.abc import Callable
from time import monotonic

MAX_WAIT_SECONDS = 1.0  # maximum wait, so that the body is still fresh
_BURST_SECONDS = 0.05  # a burst of this length may compensate for a late event loop


class RateLimiter:
    """A limit on permits per second, first come, first served; 0 means no limit."""

    def __init__(self, rate: float, clock: Callable[[], float] = monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._clock = clock
        self._next = 0.0

    async def acquire(self) -> bool:
        """Wait for a permit; return False after `MAX_WAIT_SECONDS` if too many callers are waiting."""
        if not self._interval:
            return True
        now = self._clock()
        start = max(self._next, now - _BURST_SECONDS)
        if start - now > max(MAX_WAIT_SECONDS, self._interval):
            await asyncio.sleep(MAX_WAIT_SECONDS)
            return False
        self._next = start + self._interval
        if start > now:
            await asyncio.sleep(start - now)
        return True
