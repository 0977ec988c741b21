"""The database's clock, as this process last saw it: one clock for all machines, and here one that never jumps.

Each transaction looks at it, and between two looks the time that has passed here is added.
"""

import time
from datetime import UTC, datetime, timedelta

from archiver import telemetry

TOLERANCE = timedelta(minutes=1)  # by which the clock of a machine may be ahead of the database's


class _Clock:
    at: float | None = None  # Unix time at the last look; None before the first
    seen: float = 0.0  # when that was, on `time.monotonic`


_clock = _Clock()


def look(at: float, began: float) -> None:
    """The database has said what time it is; `began`: when it was asked, on `time.monotonic`."""
    ended = time.monotonic()
    _clock.at, _clock.seen = at, (began + ended) / 2
    telemetry.clock_difference.set(time.time() - (ended - began) / 2 - at)


def now() -> datetime:
    """The time by the database's clock; by this machine's before the first transaction."""
    if _clock.at is None:
        return datetime.now(UTC)
    return datetime.fromtimestamp(_clock.at + time.monotonic() - _clock.seen, UTC)


def at_most_now(moment: datetime) -> datetime:
    """A time that a machine said, which is not in the future, or at most by `TOLERANCE`. Within a transaction."""
    return min(moment, now() + TOLERANCE)
