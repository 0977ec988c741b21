"""Limit how often passwords and codes may be tried (I12)."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from time import monotonic

from archiver.console.visitors import Visitor
from archiver.errors import ArchiverError

MAX_FAILURES, FAILURE_SECONDS = 5, 300.0  # per network and name
MAX_FAILURES_OF_NETWORK = 50  # in total; not of a proxy that does not name its visitors
MAX_REMEMBERED = 10_000  # networks, and pairs of network and name
MAX_WAITING, MAX_WAITING_OF_ADDRESS = 32, 3
MAX_WAITING_OF_PROXY = 16  # if it does not name its visitors
REST_SECONDS = 0.3  # pause after each failed attempt, so that a flood of attempts leaves most of a core to others


class TooManyAttemptsError(ArchiverError):
    """Too many failed or concurrent attempts; `seconds`: when another may be made."""

    def __init__(self, seconds: float) -> None:
        super().__init__("Too many attempts to log in.")
        self.seconds = max(1, round(seconds))


class Attempts:
    """The failed attempts of one process, and the turns to check one: `concurrent` at a time."""

    def __init__(self, concurrent: int = 1) -> None:
        self._failed: OrderedDict[tuple[str, str | None], list[float]] = OrderedDict()  # name None: any
        self._turns = asyncio.Semaphore(concurrent)
        self._waiting: Counter[str] = Counter()  # by network

    @asynccontextmanager
    async def turn(self, visitor: Visitor, name: str) -> AsyncIterator[None]:
        """Wait for a turn to check a password or a code. Raises `TooManyAttemptsError`."""
        network = visitor.network
        self._check(visitor, name)
        most = MAX_WAITING_OF_PROXY if visitor.is_shared else MAX_WAITING_OF_ADDRESS
        if self._waiting[network] >= most or self._waiting.total() >= MAX_WAITING:
            raise TooManyAttemptsError(1)
        self._waiting[network] += 1
        try:
            async with self._turns:
                self._check(visitor, name)  # again: others may have failed in the meantime
                yield
        finally:
            self._waiting[network] -= 1
            if not self._waiting[network]:
                del self._waiting[network]

    def _check(self, visitor: Visitor, name: str) -> None:
        now = monotonic()
        for key, most in _limits(visitor, name):
            recent = [at for at in self._failed.get(key, ()) if now - at < FAILURE_SECONDS]
            if len(recent) >= most:
                raise TooManyAttemptsError(recent[0] + FAILURE_SECONDS - now)

    async def failed(self, visitor: Visitor, name: str) -> None:
        """Record a failed attempt, within its turn."""
        for key, most in _limits(visitor, name):
            self._failed[key] = [*self._failed.pop(key, []), monotonic()][-most:]
            if len(self._failed) > MAX_REMEMBERED:
                self._failed.popitem(last=False)
        await asyncio.sleep(REST_SECONDS)

    def succeeded(self, visitor: Visitor, name: str) -> None:
        """Forget the failed attempts of this visitor and name, but not those with other names."""
        self._failed.pop((visitor.network, name), None)


def _limits(visitor: Visitor, name: str) -> Iterator[tuple[tuple[str, str | None], int]]:
    """Return what is counted for an attempt, and how many may fail."""
    yield (visitor.network, name), MAX_FAILURES
    if not visitor.is_shared:
        yield (visitor.network, None), MAX_FAILURES_OF_NETWORK
