"""Parse reported times, and reject impossible ones.

A reported time is accepted only between `EARLIEST` and its arrival plus `CLOCK_TOLERANCE`. An earlier time is the
zero of some calendar (the year 1, 1899-12-30, 1900, the Unix epoch, 2000, 2001) and means "no value". A later time
comes from a wrong clock or a wrong unit.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

EARLIEST = datetime(2015, 1, 1, tzinfo=UTC)  # earlier than any CallHQ chat, later than the epoch of any calendar
CLOCK_TOLERANCE = timedelta(minutes=5)  # tolerance by which the platform's clock may be ahead

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGITS = re.compile(r"-?[0-9]{9,19}(\.[0-9]+)?", re.ASCII)


def timestamp(value: Any) -> datetime | None:
    """Return a time in UTC from ISO 8601 text, or from an epoch number in seconds, milli-, micro- or nanoseconds.

    Returns None for any other value, and for a time before `EARLIEST`.
    """
    try:
        result = _parsed(value)
    except (ValueError, OverflowError):
        return None
    return plausible(result)


def plausible(moment: datetime | None) -> datetime | None:
    """Return the time; None if it is before `EARLIEST`."""
    return moment if moment is not None and moment >= EARLIEST else None


def credible(moment: datetime | None, received_at: datetime) -> datetime | None:
    """Return the reported time; None if it is later than `received_at` by more than `CLOCK_TOLERANCE`."""
    return moment if moment is not None and moment <= received_at + CLOCK_TOLERANCE else None


def _parsed(value: Any) -> datetime | None:
    if isinstance(value, str):
        if not _DIGITS.fullmatch(value):
            parsed = datetime.fromisoformat(value.upper())
            if parsed.tzinfo is UTC:
                return parsed
            return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return _from_epoch(value)


def _from_epoch(value: float) -> datetime:
    for limit, unit in ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6)):
        if abs(value) < limit:
            # Integers stay exact; timedelta rounds to microseconds.
            return _EPOCH + timedelta(seconds=value / unit)
    return _EPOCH + timedelta(seconds=value / 1e9)
