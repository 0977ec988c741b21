"""Parse `Retry-After`, with which a server asks its client to wait (RFC 9110, 10.2.3)."""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?", re.ASCII)


def parse(header: str, now: datetime) -> float | None:
    """Return the seconds to wait, from seconds or an HTTP date; 0 for a past date, None for an unreadable header.

    Each caller sets its own limits.
    """
    text = header.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError, TypeError):
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((aware - now).total_seconds(), 0.0)
