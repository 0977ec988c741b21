"""The database's clock, as this process last read it: one clock for all machines.

Each transaction reads it. Between two readings, the time elapsed on this machine's monotonic clock is added.
"""

import time
from datetime import UTC, datetime, timedelta

from archiver import telemetry

TOLERANCE = timedelta(minutes=1)  # tolerance by which a machine's clock may be ahead of the database clock
MAX_AGE_SECONDS = 10.0  # of a reading; the monotonic clock stands still while a virtual machine is suspended
MAX_ROUND_TRIP_SECONDS = 1.0  # a longer one waited for a lock, which was requested after the time
# The longest wait for a retry, a pause or an open circuit: a server may request a day; an hour is left for clocks. A
# later due time was stored while a clock was ahead. A reading may also wait for the lifetime of its session.
MAX_WAIT = timedelta(hours=25)


class _DatabaseClock:
    at: float | None = None  # database time of the last reading, as Unix time; None before the first
    seen: float = 0.0  # time of that reading on `time.monotonic`
    seen_at: float = 0.0  # the same on `time.time`


_clock = _DatabaseClock()


def look(at: float, began: float) -> None:
    """Record the database's time. `began`: when it was requested, on `time.monotonic`."""
    ended = time.monotonic()
    one_way = min(ended - began, MAX_ROUND_TRIP_SECONDS) / 2
    _clock.at, _clock.seen, _clock.seen_at = at, began + one_way, time.time() - (ended - began) + one_way
    telemetry.clock_difference.set(_clock.seen_at - at)


def is_known() -> bool:
    """Return whether the database's time was read recently, by both clocks of this machine."""
    ages = time.monotonic() - _clock.seen, time.time() - _clock.seen_at
    return _clock.at is not None and all(-MAX_AGE_SECONDS < age < MAX_AGE_SECONDS for age in ages)


def now() -> datetime:
    """Return the time on the database's clock; on this machine's before the first transaction."""
    if _clock.at is None:
        return datetime.now(UTC)
    return datetime.fromtimestamp(_clock.at + time.monotonic() - _clock.seen, UTC)


def at_most_now(moment: datetime) -> datetime:
    """Return a reported time, limited to now plus `TOLERANCE`. Call it within a transaction."""
    return min(moment, now() + TOLERANCE)
