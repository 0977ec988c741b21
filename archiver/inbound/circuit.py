"""Break the circuit between ingest and Postgres: while it is open, no events are sent."""

from collections.abc import Iterable
from time import monotonic

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from archiver.inbound.probe import trial_fault
from archiver.inbound.writing import UnavailableError

log = structlog.get_logger(__name__)

LOG_SECONDS = 60.0


class Circuit:
    """A circuit breaker, which opens if Postgres does not store a trial event.

    A full disk also opens it, without a trial, because a trial that is rolled back does not detect a full disk. The
    circuit then stays open until an event is stored.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._logged_at = -LOG_SECONDS
        self.is_open = False

    async def judge(self, faults: Iterable[UnavailableError]) -> None:
        """Open or close the circuit after failed transactions."""
        if any(fault.is_disk_full for fault in faults):
            self._open("the disk of Postgres is full")
        elif (fault := await trial_fault(self._engine)) is not None:
            self._open(fault.detail)
        else:
            self.close()

    async def allows_trial(self) -> bool:
        """Return whether Postgres stores a trial event; the circuit stays open until an event is stored."""
        fault = await trial_fault(self._engine)
        if fault is not None and monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = monotonic()
            log.error("circuit still open; spooling", database=fault.detail)
        return fault is None

    def close(self) -> None:
        """Close the circuit, because Postgres stored an event."""
        if self.is_open:
            log.info("circuit closed")
        self.is_open = False

    def _open(self, reason: str) -> None:
        if not self.is_open:
            log.error("circuit open; database accepts no events", reason=reason)
        self.is_open = True
