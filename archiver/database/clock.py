"""The database's clock, as this process last read it: one clock for all machines.

Each transaction reads it. Between two readings, the time elapsed on this machine's monotonic clock is added.
"""

import time
from datetime import UTC, datetime, timedelta

from archiver import telemetry

TOLERANCE = timedelta(minutes=1)  # tolerance by which a machine's clock may be ahead of the database clock


class _DatabaseClock:
    at: float | None = None  # database time of the last reading, as Unix time; None before the first
    seen: float = 0.0  # time of that reading on `time.monotonic`


_clock = _DatabaseClock()


def look(at: float, began: float) -> None:
    """Record the database's time. `began`: when it was requested, on `time.monotonic`."""
    ended = time.monotonic()
    _clock.at, _clock.seen = at, (began + ended) / 2
    telemetry.clock_difference.set(time.time() - (ended - began) / 2 - at)


def now() -> datetime:
    """Return the time on the database's clock; on this machine's before the first transaction."""
    if _clock.at is None:
        return datetime.now(UTC)
    return datetime.fromtimestamp(_clock.at + time.monotonic() - _clock.seen, UTC)


def at_most_now(moment: datetime) -> datetime:
    """Return a reported time, limited to now plus `TOLERANCE`. Call it within a transaction."""
    return min(moment, now() + TOLERANCE)
